// What a program in C++ does with a package, without Python.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <ATen/ops/from_file.h>
#include <cstdlib>
#include <vector>

// Runs a compiled package: PACKAGE INPUT OUTPUT SIZE... The input is a file of floats of this size.
int main(int count, char** words) {
  c10::InferenceMode mode;
  std::vector<int64_t> size;
  for (int i = 4; i < count; i++) size.push_back(std::atoll(words[i]));
  int64_t values = c10::multiply_integers(size);
  at::Tensor x = at::from_file(words[2], false, values, at::kFloat).view(size);
  torch::inductor::AOTIModelPackageLoader loader(words[1]);
  at::Tensor y = loader.run({x})[0].contiguous();
  at::from_file(words[3], true, y.numel(), at::kFloat).copy_(y.view(-1));
}
