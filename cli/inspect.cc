// strandline inspect: what one checkpoint says about itself.

#include <fmt/format.h>

#include <filesystem>
#include <string_view>
#include <utility>
#include <variant>

#include "json.h"
#include "locate.h"
#include "strandline/checkpoint.h"
#include "text.h"
#include "verbs.h"

namespace strandline::cli {
namespace {

constexpr std::size_t kValueCharactersShownMax = 100;  // --json has them whole.

struct Opened {
  Checkpoint checkpoint;
  std::filesystem::path path;       // Relative if the command line was.
  ExitCode code = ExitCode::kFine;  // What was found on the way to it.
};

// The newest step that opens; newer ones that do not are complained about.
Result<Opened> open_newest(const std::filesystem::path& directory) {
  auto steps = find_steps(directory);
  if (!steps) return failure(steps.error());
  ExitCode code = ExitCode::kFine;
  Error error;
  for (const StepEntry* entry : newest_first(*steps)) {
    const std::filesystem::path path = directory / entry->name;
    auto checkpoint = Checkpoint::open(path);
    if (checkpoint) return Opened{std::move(*checkpoint), path, code};
    error = error_of_step(checkpoint.error());
    code = worse(code, exit_code_of(error));
    complain("skipped step " + std::to_string(entry->step) + ": " + error.text());
  }
  error.message = "no step in '" + directory.string() + "' can be read";
  return failure(error);
}

Result<Opened> open_one(const std::filesystem::path& path) {
  auto checkpoint = Checkpoint::open(path);
  if (!checkpoint) return failure(checkpoint.error());
  return Opened{std::move(*checkpoint), path};
}

Result<Opened> open_asked_for(const InspectOptions& options) {
  if (is_checkpoint(options.path)) return open_one(options.path);
  if (!options.step) return open_newest(options.path);
  auto entry = find_step(options.path, *options.step);
  if (!entry) return failure(entry.error());
  auto opened = open_one(std::filesystem::path(options.path) / entry->name);
  return opened ? std::move(opened) : failure(error_of_step(opened.error()));
}

std::string shape_text(const std::vector<std::uint64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

std::string_view kind_text(NodeKind kind) {
  switch (kind) {
    case NodeKind::kDict:
      return "dict";
    case NodeKind::kOrderedDict:
      return "ordered dict";
    case NodeKind::kCounter:
      return "counter";
    case NodeKind::kList:
      return "list";
    case NodeKind::kTuple:
      return "tuple";
    case NodeKind::kTensor:
      return "tensor";
    case NodeKind::kValue:
      return "value";
  }
  return "unknown";
}

struct TypeName {
  std::string operator()(const Value::None&) const { return "none"; }
  std::string operator()(bool) const { return "bool"; }
  std::string operator()(std::int64_t) const { return "int"; }
  std::string operator()(const Value::BigInteger&) const { return "int"; }
  std::string operator()(double) const { return "float"; }
  std::string operator()(const std::string&) const { return "str"; }
  std::string operator()(const Value::Bytes&) const { return "bytes"; }
  std::string operator()(const Value::List&) const { return "list"; }
  std::string operator()(const Value::Tagged& value) const { return value.tag; }
};

std::string type_name(const Value& value) { return std::visit(TypeName{}, value.data()); }

std::string where_text(const Checkpoint& checkpoint, std::uint32_t tensor) {
  const StoredTensor& stored = checkpoint.stored()[tensor];
  if (!stored.alias_of) return stored.file;
  const Structure& structure = checkpoint.tree().structure();
  std::string text = "alias of " + structure.path_text(structure.tensors()[*stored.alias_of].node);
  if (stored.alias_offset_bytes > 0) text += fmt::format(" + {} bytes", stored.alias_offset_bytes);
  return text;
}

std::string summary_text(const Opened& opened) {
  const CheckpointInfo& info = opened.checkpoint.info();
  Table table({{""}, {""}});
  table.add_row({"checkpoint", opened.path.string()});
  table.add_row({"step", std::to_string(info.step)});
  table.add_row({"sequence", fmt::format("{} (parent {})", info.sequence,
                                         info.parent ? std::to_string(*info.parent) : "none")});
  table.add_row({"run", info.run});
  table.add_row({"created", local_time(info.created_ns)});
  table.add_row({"format", fmt::format("{}.{}", info.format_major, info.format_minor)});
  table.add_row({"ranks", std::to_string(info.world)});
  table.add_row({"size", fmt::format("{} in {}", human_bytes(info.bytes),
                                     counted(info.files.size() + 1, "file"))});
  for (const auto& [name, value] : info.metrics) {
    table.add_row({"metric", fmt::format("{} = {:g}", name, value)});
  }
  const Structure& metadata = info.metadata.structure();
  for (std::uint32_t i = 1; i < metadata.nodes().size(); ++i) {
    const Structure::Node& node = metadata.nodes()[i];
    if (node.kind != NodeKind::kValue) continue;
    const std::string value = info.metadata.values()[node.leaf].text();
    table.add_row(
        {"metadata", metadata.path_text(i) + " = " + shortened(value, kValueCharactersShownMax)});
  }
  return table.text();
}

std::string files_text(const CheckpointInfo& info) {
  Table table({{"FILE"}, {"SIZE", true}, {"GROUP"}, {"RANK", true}});
  for (const FileInfo& file : info.files) {
    table.add_row({file.name, human_bytes(file.bytes), file.group.empty() ? "-" : file.group,
                   std::to_string(file.rank)});
  }
  return table.text();
}

// The leaves below `root`, and its empty containers, each with its whole path: one line says all,
// so that grep finds it.
std::string tree_text(const Checkpoint& checkpoint, std::uint32_t root) {
  const StateDict& tree = checkpoint.tree();
  const Structure& structure = tree.structure();
  Table table({{"KEY"}, {"TYPE"}, {"SHAPE"}, {"SIZE", true}, {"WHERE OR VALUE"}});
  std::uint64_t tensors = 0;
  std::uint64_t values = 0;
  std::uint64_t bytes = 0;
  for (std::uint32_t i = root; i < structure.nodes()[root].end; ++i) {
    const Structure::Node& node = structure.nodes()[i];
    const std::string key = structure.path_text(i);
    if (node.kind == NodeKind::kTensor) {
      const Structure::Tensor& tensor = structure.tensors()[node.leaf];
      table.add_row({key, std::string(dtype_name(tensor.dtype)), shape_text(tensor.shape),
                     human_bytes(tensor.byte_count()), where_text(checkpoint, node.leaf)});
      ++tensors;
      bytes += checkpoint.stored()[node.leaf].alias_of ? 0 : tensor.byte_count();
    } else if (node.kind == NodeKind::kValue) {
      const Value& value = tree.values()[node.leaf];
      table.add_row(
          {key, type_name(value), "", "", shortened(value.text(), kValueCharactersShownMax)});
      ++values;
    } else if (node.end == i + 1) {
      table.add_row({key, std::string(kind_text(node.kind)), "", "", "(empty)"});
    }
  }
  return fmt::format("{}\n{} ({} stored), {}\n", table.text(), counted(tensors, "tensor"),
                     human_bytes(bytes), counted(values, "value"));
}

void add_path(JsonWriter& json, const Structure& structure, std::uint32_t node) {
  json.key("key").text(structure.path_text(node));
  json.key("path").begin_array();
  for (const Key& key : structure.path(node)) json.value(key);
  json.end_array();
}

void add_value(JsonWriter& json, const StateDict& state, std::uint32_t node) {
  const Value& value = state.values()[state.structure().nodes()[node].leaf];
  json.begin_object();
  add_path(json, state.structure(), node);
  json.key("type").text(type_name(value)).key("value").value(value).end_object();
}

void add_values(JsonWriter& json, const StateDict& state, std::uint32_t root) {
  const auto& nodes = state.structure().nodes();
  json.begin_array();
  for (std::uint32_t i = root; i < nodes[root].end; ++i) {
    if (nodes[i].kind == NodeKind::kValue) add_value(json, state, i);
  }
  json.end_array();
}

void add_tensor(JsonWriter& json, const Checkpoint& checkpoint, std::uint32_t index) {
  const Structure& structure = checkpoint.tree().structure();
  const Structure::Tensor& tensor = structure.tensors()[index];
  const StoredTensor& stored = checkpoint.stored()[index];
  json.begin_object();
  add_path(json, structure, tensor.node);
  json.key("dtype").text(dtype_name(tensor.dtype));
  json.key("shape").begin_array();
  for (const std::uint64_t extent : tensor.shape) json.number(extent);
  json.end_array();
  json.key("bytes").number(tensor.byte_count()).key("file").text(stored.file);
  json.key("name").text(stored.name).key("file_offset").number(stored.file_offset);
  json.key("alias_of");
  if (stored.alias_of) {
    json.text(structure.path_text(structure.tensors()[*stored.alias_of].node));
    json.key("alias_offset_bytes").number(stored.alias_offset_bytes);
  } else {
    json.null();
  }
  json.end_object();
}

void add_summary(JsonWriter& json, const Opened& opened) {
  const CheckpointInfo& info = opened.checkpoint.info();
  json.key("path").text(opened.path.string());
  add_info(json, info);
  json.key("metadata");
  add_values(json, info.metadata, 0);
  json.key("files").begin_array();
  for (const FileInfo& file : info.files) {
    json.begin_object().key("name").text(file.name).key("bytes").number(file.bytes);
    json.key("group").text(file.group).key("rank").number(std::uint64_t{file.rank});
    json.key("header_digest").text(file.header_digest).end_object();
  }
  json.end_array();
}

std::string json_of(const Opened& opened, std::uint32_t root) {
  const Checkpoint& checkpoint = opened.checkpoint;
  const StateDict& tree = checkpoint.tree();
  const auto& nodes = tree.structure().nodes();
  JsonWriter json;
  json.begin_object();
  add_summary(json, opened);
  json.key("tensors").begin_array();
  for (std::uint32_t i = root; i < nodes[root].end; ++i) {
    if (nodes[i].kind == NodeKind::kTensor) add_tensor(json, checkpoint, nodes[i].leaf);
  }
  json.end_array().key("values");
  add_values(json, tree, root);
  json.end_object();
  return json.finish();
}

}  // namespace

ExitCode run_inspect(const InspectOptions& options, Output& output) {
  if (options.step && is_checkpoint(options.path)) {
    complain("--step needs a directory of checkpoints; '" + options.path + "' is one checkpoint");
    return ExitCode::kUsage;
  }
  auto opened = open_asked_for(options);
  if (!opened) {
    complain(opened.error().text());
    return exit_code_of(opened.error());
  }
  const Checkpoint& checkpoint = opened->checkpoint;
  std::optional<std::uint32_t> root = 0;
  if (!options.keys.empty()) root = checkpoint.tree().structure().find(options.keys);
  if (!root) {
    complain("no key '" + options.keys + "' in '" + opened->path.string() +
             "'; inspect without --keys lists them");
    return ExitCode::kUnreadable;
  }
  if (options.json) {
    output.write(json_of(*opened, *root));
  } else if (options.keys.empty()) {
    output.write(summary_text(*opened) + '\n' + files_text(checkpoint.info()) + '\n' +
                 tree_text(checkpoint, *root));
  } else {
    output.write(tree_text(checkpoint, *root));
  }
  return opened->code;
}

}  // namespace strandline::cli
