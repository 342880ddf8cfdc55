#include "format/tree_json.h"

#include <fmt/format.h>

#include <array>
#include <optional>
#include <utility>

#include "format/value_json.h"

namespace strandline::format {
namespace {

struct ContainerName {
  std::string_view name;
  NodeKind kind;
};

constexpr std::array<ContainerName, 5> kContainers{{
    {"dict", NodeKind::kDict},
    {"ordered_dict", NodeKind::kOrderedDict},
    {"counter", NodeKind::kCounter},
    {"list", NodeKind::kList},
    {"tuple", NodeKind::kTuple},
}};

std::string_view container_name(NodeKind kind) {
  for (const ContainerName& container : kContainers) {
    if (container.kind == kind) return container.name;
  }
  return {};
}

bool is_sequence(NodeKind kind) { return kind == NodeKind::kList || kind == NodeKind::kTuple; }

class TreeWriter {
 public:
  TreeWriter(std::string& out, const StateDict& state, const AppendTensor& append_tensor)
      : out_(out), state_(state), append_tensor_(append_tensor) {}

  // Recursive; a state dict is at most kStateDepthMax deep.
  Status write(std::uint32_t index) {
    const Structure::Node& node = state_.structure().nodes()[index];
    if (node.kind == NodeKind::kTensor) return append_tensor_(out_, node.leaf);
    if (node.kind == NodeKind::kValue) {
      return located(append_value(out_, state_.values()[node.leaf]), index);
    }
    return write_container(index);
  }

 private:
  Status write_container(std::uint32_t index) {
    const auto& nodes = state_.structure().nodes();
    const Structure::Node& node = nodes[index];
    out_ += "{\"";
    out_ += container_name(node.kind);
    out_ += "\":[";
    bool first = true;
    std::optional<std::uint32_t> metadata;
    for (std::uint32_t child = index + 1; child < node.end; child = nodes[child].end) {
      if (nodes[child].metadata) {
        metadata = child;
        continue;
      }
      if (!first) out_ += ',';
      first = false;
      STRANDLINE_RETURN_IF_ERROR(write_item(node.kind, child));
    }
    out_ += ']';
    if (metadata) {
      out_ += ",\"metadata\":";
      STRANDLINE_RETURN_IF_ERROR(write(*metadata));
    }
    out_ += '}';
    return {};
  }

  Status write_item(NodeKind parent, std::uint32_t child) {
    if (is_sequence(parent)) return write(child);
    out_ += '[';
    STRANDLINE_RETURN_IF_ERROR(
        located(append_value(out_, state_.structure().nodes()[child].key), child));
    out_ += ',';
    STRANDLINE_RETURN_IF_ERROR(write(child));
    out_ += ']';
    return {};
  }

  // The same status, saying which node it is about.
  [[nodiscard]] Status located(Status status, std::uint32_t node) const {
    if (status) return status;
    Error error = std::move(status).error();
    error.key_path = state_.structure().path_text(node);
    error.message =
        fmt::format("cannot save '{}' in the manifest: {}", error.key_path, error.message);
    return failure(std::move(error));
  }

  std::string& out_;
  const StateDict& state_;
  const AppendTensor& append_tensor_;
};

// The container that an object stands for, if it stands for one.
Result<std::optional<ContainerName>> find_container(const JsonNode& node,
                                                    const JsonObject& members) {
  std::optional<ContainerName> found;
  for (const ContainerName& container : kContainers) {
    if (!members.find(container.name)) continue;
    if (found) return node.corrupt("is two kinds of container at once");
    found = container;
  }
  return found;
}

class TreeReader {
 public:
  TreeReader(StateDictBuilder& builder, const ReadTensor& read_tensor)
      : builder_(builder), read_tensor_(read_tensor) {}

  // Reads the items of the container that is open in the builder. Recursive; the builder refuses
  // to open more than kStateDepthMax.
  Status read_items(const JsonObject& members, const ContainerName& container) {
    STRANDLINE_ASSIGN_OR_RETURN(const JsonNode items, members.member(container.name));
    STRANDLINE_RETURN_IF_ERROR(
        items.for_each_item([&](const JsonNode& item, std::size_t) -> Status {
          return is_sequence(container.kind) ? read_node(Key(), item) : read_pair(item);
        }));
    const auto metadata = members.find("metadata");
    if (!metadata || container.kind != NodeKind::kOrderedDict) return {};
    STRANDLINE_ASSIGN_OR_RETURN(const JsonObject metadata_members, metadata->object());
    STRANDLINE_ASSIGN_OR_RETURN(const auto kind, find_container(*metadata, metadata_members));
    if (!kind) return metadata->corrupt("is not a container");
    STRANDLINE_RETURN_IF_ERROR(located(builder_.begin_metadata(kind->kind), *metadata));
    STRANDLINE_RETURN_IF_ERROR(read_items(metadata_members, *kind));
    return builder_.end();
  }

 private:
  Status read_pair(const JsonNode& pair) {
    std::optional<Key> key;
    std::size_t size = 0;
    STRANDLINE_RETURN_IF_ERROR(
        pair.for_each_item([&](const JsonNode& item, std::size_t index) -> Status {
          size = index + 1;
          if (index == 0) {
            STRANDLINE_ASSIGN_OR_RETURN(key, read_value(item));
            return {};
          }
          if (index == 1) return read_node(*std::move(key), item);
          return {};
        }));
    if (size != 2) return pair.corrupt("is not a pair of a key and a node");
    return {};
  }

  Status read_node(Key key, const JsonNode& node) {
    if (node.type() != JsonNode::Type::kObject) return read_plain(std::move(key), node);
    STRANDLINE_ASSIGN_OR_RETURN(const JsonObject members, node.object());
    STRANDLINE_ASSIGN_OR_RETURN(const auto container, find_container(node, members));
    const auto tensor = members.find("tensor");
    const auto alias = members.find("alias");
    if ((container ? 1 : 0) + (tensor ? 1 : 0) + (alias ? 1 : 0) > 1) {
      return node.corrupt("is more than one of container, tensor and alias");
    }
    if (container) {
      STRANDLINE_RETURN_IF_ERROR(located(builder_.begin(std::move(key), container->kind), node));
      STRANDLINE_RETURN_IF_ERROR(read_items(members, *container));
      return builder_.end();
    }
    if (tensor || alias) {
      STRANDLINE_ASSIGN_OR_RETURN(
          TensorView view, read_tensor_(tensor ? "tensor" : "alias", tensor ? *tensor : *alias));
      return located(builder_.tensor(std::move(key), std::move(view)), node);
    }
    return read_plain(std::move(key), node);
  }

  Status read_plain(Key key, const JsonNode& node) {
    STRANDLINE_ASSIGN_OR_RETURN(Value value, read_value(node));
    return located(builder_.value(std::move(key), std::move(value)), node);
  }

  // What the builder refuses, a damaged or hostile file has asked for.
  static Status located(Status status, const JsonNode& node) {
    if (status) return status;
    return node.corrupt(status.error().message);
  }

  StateDictBuilder& builder_;
  const ReadTensor& read_tensor_;
};

}  // namespace

Status append_tree(std::string& out, const StateDict& state, const AppendTensor& append_tensor) {
  return TreeWriter(out, state, append_tensor).write(0);
}

Result<StateDict> read_tree(const JsonNode& node, const ReadTensor& read_tensor) {
  STRANDLINE_ASSIGN_OR_RETURN(const JsonObject members, node.object());
  STRANDLINE_ASSIGN_OR_RETURN(const auto root, find_container(node, members));
  if (!root || is_sequence(root->kind)) return node.corrupt("is not a dict at its root");
  StateDictBuilder builder(root->kind);
  STRANDLINE_RETURN_IF_ERROR(TreeReader(builder, read_tensor).read_items(members, *root));
  return builder.finish();
}

}  // namespace strandline::format
