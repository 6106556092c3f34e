// Runs operations that a file describes, on a machine that has no Python: portable_driver INPUT OUTPUT.
//
// INPUT: Shape; int64 algorithm, threads, number of operations; each operation with the size of an array in bytes in
// place of its address, followed by these arrays; the image; int64 bytes of the workspace, and its contents. OUTPUT:
// the workspace and the output image. Without operations: workspace_bytes() as a decimal number.
#include <vector>

#include "cpu/runner.h"
#include "portable_memory.h"

int main(int, char **argv) try {
  std::FILE *in = std::fopen(argv[1], "rb");
  memnet::Shape shape;
  std::int64_t settings[3];
  read(in, &shape, sizeof shape);
  read(in, settings, sizeof settings);
  const auto algorithm = static_cast<memnet::Algorithm>(settings[0]);
  const int threads = static_cast<int>(settings[1]);
  std::FILE *out = std::fopen(argv[2], "wb");
  if (settings[2] == 0) {
    std::fprintf(out, "%lld", static_cast<long long>(memnet::workspace_bytes(shape, algorithm, "baseline", threads)));
    return std::fclose(out);
  }
  std::vector<memnet::Op> ops(settings[2]);
  for (memnet::Op &op : ops) {
    read(in, &op, sizeof op);
    for (std::uint64_t *field :
         {&op.srcs, &op.scale, &op.shift, &op.weight_a, &op.bias_a, &op.weight_b, &op.bias_b, &op.head_weights})
      if (*field != 0) {
        const Guarded array(*field);
        read(in, array.data(), array.size);
        *field = reinterpret_cast<std::uint64_t>(array.data());
      }
  }
  const Guarded image(shape.n * shape.cin * shape.h * shape.w * sizeof(float));
  const Guarded result(shape.n * shape.cout * shape.h * shape.w * sizeof(float));
  read(in, image.data(), image.size);
  std::int64_t bytes;
  read(in, &bytes, sizeof bytes);
  const Guarded workspace(bytes);
  read(in, workspace.data(), workspace.size);
  memnet::run(ops.data(), ops.size(), shape, workspace.data(), bytes, reinterpret_cast<float *>(image.data()),
              reinterpret_cast<float *>(result.data()), algorithm, "baseline", threads, nullptr);
  image.check("the image");
  workspace.check("the workspace");
  result.check("the output");
  std::fwrite(workspace.data(), 1, workspace.size, out);
  std::fwrite(result.data(), 1, result.size, out);
  return std::fclose(out);
} catch (const std::exception &error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
