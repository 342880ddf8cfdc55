#include "staging/check_views.h"

#include <string>
#include <utility>

namespace strandline::staging {

Status check_views(const StateDict& state, std::string_view verb) {
  const Structure& structure = state.structure();
  if (state.tensors().size() != structure.tensors().size()) {
    return failure(ErrorCode::kInvalidArgument,
                   "the state dict was built with " + std::to_string(structure.tensors().size()) +
                       " tensors but has " + std::to_string(state.tensors().size()) +
                       " views: give every tensor one");
  }
  for (std::size_t i = 0; i < structure.tensors().size(); ++i) {
    const Structure::Tensor& declared = structure.tensors()[i];
    const TensorView& view = state.tensors()[i];
    Status status = view.check();
    if (status && (view.shape != declared.shape || view.dtype != declared.dtype)) {
      status = failure(ErrorCode::kInvalidArgument,
                       "the view's shape or type is not what the state dict was built with: build "
                       "it again");
    }
    if (!status) {
      Error error = std::move(status).error();
      error.key_path = structure.path_text(declared.node);
      error.message = "cannot " + std::string(verb) + " '" + error.key_path + "': " + error.message;
      return failure(std::move(error));
    }
  }
  return {};
}

}  // namespace strandline::staging
