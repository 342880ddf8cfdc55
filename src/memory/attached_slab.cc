// The receiving side of shared memory; the slab's own side, and why it is safe, is in
// shared_pages.cc.
//
// What arrives is a process, a descriptor there, and numbers. None of it is trusted: the process
// may have ended and its number be another's, the descriptor may be any file by now, and whoever
// sent it may lie. So the file is looked at through a descriptor that can do nothing else (O_PATH)
// before it is opened: opening a device or a pipe can block or do things. Only a memory file of
// this user that can never become shorter is opened, and only if its table names the slab is it
// used. Numbers of the table are read once and checked against the file before they are addresses.
//
// The descriptor is a new open file description, not a copy of the sender's, so that the locks on
// it are this process's own. A slab has one, whatever the number of its generations; a generation
// is mapped once, whatever the number of ranges attached. Both go with their last holder.
//
// If the slab's own process has ended or dropped the slab, nobody else gives pages back: then the
// last process that lets go of a generation does, and needs the exclusive lock for it.
//
// Fork. A child inherits mappings and locks, and can read for as long as the parent holds them. In
// it, dropping does nothing: the lock is the parent's too.

#include "memory/attached_slab.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <functional>
#include <limits>
#include <utility>

#include "base/fork.h"
#include "base/result_macros.h"
#include "base/system_error.h"
#include "memory/pages.h"
#include "memory/range_lock.h"

namespace strandline::memory {
namespace {

constexpr std::size_t kIdCharacters = 32;

Status check_form(const SharedRange& range) {
  const bool id_is_hex = range.slab.size() == kIdCharacters &&
                         range.slab.find_first_not_of("0123456789abcdef") == std::string::npos;
  if (range.pid <= 0 || range.pid > std::numeric_limits<pid_t>::max() || range.descriptor < 0 ||
      !id_is_hex) {
    return failure(ErrorCode::kInvalidArgument, "this is no range of shared memory (process " +
                                                    std::to_string(range.pid) + ", descriptor " +
                                                    std::to_string(range.descriptor) +
                                                    "); pass on what share() returned");
  }
  return {};
}

bool within(const std::byte* data, const std::byte* begin, std::uint64_t bytes) {
  return std::less_equal<>()(begin, data) && std::less<>()(data, begin + bytes);
}

Error not_there(const SharedRange& range, const std::string& why) {
  return Error{.code = ErrorCode::kNotFound,
               .message = "the shared memory " + range.slab + " is not open in process " +
                          std::to_string(range.pid) + ": " + why +
                          "; keep the process that sent it running, and its result held, until it "
                          "has been received"};
}

// Opens the sender's descriptor anew if it is a memory file of this user.
Result<base::UniqueFd> open_memory_file(const SharedRange& range) {
  const std::string path =
      "/proc/" + std::to_string(range.pid) + "/fd/" + std::to_string(range.descriptor);
  const base::UniqueFd looked_at(::open(path.c_str(), O_PATH | O_CLOEXEC));
  if (!looked_at) {
    const int error = errno;
    if (error == ENOENT || error == ESRCH) {
      return failure(not_there(range, "the process has ended or closed it"));
    }
    Error refusal = base::system_error("open the shared memory", path, error);
    if (error == EACCES || error == EPERM) {
      refusal.message = "process " + std::to_string(range.pid) +
                        " does not let this one open its memory: it runs as another user or with "
                        "other rights; run both as the same user, without set-user-ID";
    }
    return failure(std::move(refusal));
  }
  struct stat file {};
  struct statfs system {};
  const bool is_memory_file = ::fstat(looked_at.get(), &file) == 0 && S_ISREG(file.st_mode) &&
                              file.st_nlink == 0 && file.st_uid == ::geteuid() &&
                              ::fstatfs(looked_at.get(), &system) == 0 &&
                              system.f_type == TMPFS_MAGIC;
  if (!is_memory_file) return failure(not_there(range, "that descriptor is another file"));
  const std::string again = "/proc/self/fd/" + std::to_string(looked_at.get());
  base::UniqueFd opened(::open(again.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK));
  if (!opened) return failure(base::system_error("open the shared memory", path, errno));
  const int seals = ::fcntl(opened.get(), F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    return failure(not_there(range, "that descriptor is another file"));
  }
  return opened;
}

}  // namespace

// One holder of a generation.
class AttachedSlab::Holder {
 public:
  Holder(std::shared_ptr<AttachedSlab> slab, std::uint64_t generation)
      : slab_(std::move(slab)), generation_(generation) {}
  ~Holder() { slab_->drop(generation_); }
  Holder(const Holder&) = delete;
  Holder& operator=(const Holder&) = delete;

 private:
  const std::shared_ptr<AttachedSlab> slab_;
  const std::uint64_t generation_;
};

AttachedSlab::AttachedSlab(std::string id, base::UniqueFd file, std::uint64_t file_bytes,
                           std::byte* table)
    : id_(std::move(id)),
      fork_generation_(base::fork_generation()),
      file_(std::move(file)),
      file_bytes_(file_bytes),
      table_memory_(table) {}

AttachedSlab::~AttachedSlab() { ::munmap(table_memory_, kTableBytes); }

Result<std::shared_ptr<AttachedSlab>> AttachedSlab::open(const SharedRange& range) {
  STRANDLINE_RETURN_IF_ERROR(check_form(range));
  STRANDLINE_ASSIGN_OR_RETURN(base::UniqueFd file, open_memory_file(range));
  struct stat status {};
  if (::fstat(file.get(), &status) != 0 ||
      static_cast<std::uint64_t>(status.st_size) < kTableBytes) {
    return failure(not_there(range, "that descriptor is another file"));
  }
  void* mapped = ::mmap(nullptr, kTableBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
  if (mapped == MAP_FAILED) return failure(cannot_map(kTableBytes, errno));
  const std::shared_ptr<AttachedSlab> slab(
      new AttachedSlab(range.slab, std::move(file), static_cast<std::uint64_t>(status.st_size),
                       static_cast<std::byte*>(mapped)));
  switch (GenerationTable(slab->table_memory_).head(range.slab)) {
    case GenerationTable::Head::kOurs:
      return slab;
    case GenerationTable::Head::kOtherVersion:
      return failure(ErrorCode::kUnsupported,
                     "process " + std::to_string(range.pid) +
                         " shares memory in the way of another version of Strandline; run the same "
                         "version in both processes");
    case GenerationTable::Head::kOtherSlab:
    case GenerationTable::Head::kNotATable:
      break;
  }
  return failure(not_there(range, "that descriptor is other memory"));
}

Result<AttachedMemory> AttachedSlab::attach(const SharedRange& range) {
  // Before the lock, so that after an error it is dropped without the lock.
  const auto holder = std::make_shared<const Holder>(shared_from_this(), range.generation);
  base::MutexLock lock(mutex_);
  Mapped& mapped = mapped_[range.generation];
  ++mapped.holders;
  if (mapped.data == nullptr) {
    STRANDLINE_ASSIGN_OR_RETURN(const Generation generation, lock_generation(range));
    STRANDLINE_RETURN_IF_ERROR(map(generation, mapped));
  }
  if (!lies_within(range, mapped.generation)) return failure(out_of_bounds(range));
  GenerationTable(table_memory_).count_claimed(range.generation);
  return AttachedMemory{.data = mapped.data + (range.offset - mapped.generation.offset),
                        .bytes = range.bytes,
                        .keep_alive = holder};
}

// The generation of the range, locked against being used for something else.
Result<Generation> AttachedSlab::lock_generation(const SharedRange& range) const {
  const GenerationTable table(table_memory_);
  const std::optional<Generation> before = table.find(range.generation);
  if (!before) return failure(used_again(range));
  const bool possible = before->offset % kPageBytes == 0 && before->bytes % kPageBytes == 0 &&
                        before->offset >= kTableBytes && before->offset < file_bytes_ &&
                        before->bytes > 0 && before->bytes <= file_bytes_ - before->offset;
  if (!possible) {
    return failure(ErrorCode::kCorrupt,
                   "the table of the shared memory " + id_ + " is damaged: its generation " +
                       std::to_string(range.generation) +
                       " does not lie in the memory; some process wrote where it must not");
  }
  if (!lies_within(range, *before)) return failure(out_of_bounds(range));
  const int error = lock_range(file_.get(), RangeLock::kShared, before->offset, before->bytes);
  if (error == EAGAIN) return failure(used_again(range));  // It is being taken back.
  if (error != 0) return failure(base::system_error("lock the shared memory", id_, error));
  const std::optional<Generation> after = table.find(range.generation);
  if (!after || after->offset != before->offset || after->bytes != before->bytes) {
    unlock_range(file_.get(), before->offset, before->bytes);
    return failure(used_again(range));
  }
  return *before;
}

Status AttachedSlab::map(const Generation& generation, Mapped& mapped) const {
  void* data = ::mmap(nullptr, generation.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file_.get(),
                      static_cast<off_t>(generation.offset));
  if (data == MAP_FAILED) {
    const int error = errno;
    unlock_range(file_.get(), generation.offset, generation.bytes);
    return failure(cannot_map(generation.bytes, error));
  }
  mapped.data = static_cast<std::byte*>(data);
  mapped.generation = generation;
  return {};
}

std::optional<Result<Shared>> AttachedSlab::share(const std::byte* data, std::uint64_t bytes) {
  if (base::fork_generation() != fork_generation_) return std::nullopt;
  std::shared_ptr<const Holder> holder;  // As in attach().
  base::MutexLock lock(mutex_);
  for (auto& [number, mapped] : mapped_) {
    if (mapped.data == nullptr || !within(data, mapped.data, mapped.generation.bytes)) continue;
    const auto begin = static_cast<std::uint64_t>(data - mapped.data);
    if (bytes == 0 || bytes > mapped.generation.bytes - begin) return failure(not_shared());
    holder = std::make_shared<const Holder>(shared_from_this(), number);
    ++mapped.holders;
    GenerationTable table(table_memory_);
    table.count_sent(number);
    return Shared{
        .range = {.pid = ::getpid(),
                  .descriptor = file_.get(),
                  .slab = id_,
                  .generation = number,
                  .offset = mapped.generation.offset + begin,
                  .bytes = bytes},
        .keep = holder,
        .claimed = [table, generation = number] { return table.all_claimed(generation); }};
  }
  return std::nullopt;
}

void AttachedSlab::drop(std::uint64_t generation) {
  if (base::fork_generation() != fork_generation_) return;
  base::MutexLock lock(mutex_);
  const auto at = mapped_.find(generation);
  if (at == mapped_.end()) return;
  Mapped& mapped = at->second;
  if (--mapped.holders > 0) return;
  if (mapped.data != nullptr) {
    ::munmap(mapped.data, mapped.generation.bytes);
    free_pages_of_orphan(mapped.generation);
    unlock_range(file_.get(), mapped.generation.offset, mapped.generation.bytes);
  }
  mapped_.erase(at);
}

void AttachedSlab::free_pages_of_orphan(const Generation& generation) const {
  // The slab's own process holds the first byte as long as there is a slab.
  if (lock_range(file_.get(), RangeLock::kShared, 0, 1) != 0) return;
  unlock_range(file_.get(), 0, 1);
  const auto [number, offset, bytes] = generation;
  if (lock_range(file_.get(), RangeLock::kExclusive, offset, bytes) != 0) return;
  GenerationTable table(table_memory_);
  if (table.find(number)) table.mark_dead(number);
  static_cast<void>(::fallocate(file_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                static_cast<off_t>(offset), static_cast<off_t>(bytes)));
}

}  // namespace strandline::memory
