// A program of somebody else's: saves an array to the path it is given and loads it again.
#include <strandline/checkpointer.h>

#include <cstdio>
#include <cstring>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  std::vector<float> weights{1.5F, -2.0F, 3.25F};

  const strandline::Status saved = strandline::save(
      argv[1], strandline::StateDict{{"weights", strandline::TensorView::of(weights)}});
  if (!saved) {
    std::fprintf(stderr, "%s\n", saved.error().text().c_str());
    return 1;
  }

  const auto loaded = strandline::load(argv[1]);
  if (!loaded) {
    std::fprintf(stderr, "%s\n", loaded.error().text().c_str());
    return 1;
  }
  const auto tensor = loaded->state.tensor("weights");
  if (!tensor || tensor->byte_count() != sizeof(float) * weights.size()) return 1;
  return std::memcmp(tensor->data, weights.data(), tensor->byte_count()) == 0 ? 0 : 1;
}
