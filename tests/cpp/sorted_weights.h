#pragma once
#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

// sparsemax of a row by sorting, in double: what the tests of its kernels compare with.
namespace mmfast::testing {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

inline std::vector<double> sorted_weights(const double* row, long n) {
  std::vector<double> z(row, row + n), down;
  const double top = *std::max_element(z.begin(), z.end());
  if (top == -kInfinity) return std::vector<double>(n, 0);
  for (double& x : z) x -= top;
  down = z;
  std::sort(down.begin(), down.end(), std::greater<>());
  double sum = -1, tau = 0;
  for (long k = 1; k <= n && k * down[k - 1] > sum + down[k - 1]; ++k) {
    sum += down[k - 1];
    tau = sum / k;
  }
  for (double& x : z) x = std::max(x - tau, 0.0);
  return z;
}

}  // namespace mmfast::testing
