#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../levels.h"
#include "../ops.h"

// The table of instruction sets and the calls that go through it.
namespace mmfast {

#define MMFAST_DECLARE(level)                                                                  \
  namespace level {                                                                            \
  void pairwise_lse_forward(const Pairs&, View, View, const Run&);                             \
  double pairwise_lse_backward(const Pairs&, View, View, View, View, View, View, bool,         \
                               const Run&);                                                    \
  void pairwise_lse_mean(const Pairs&, View, View, const Run&);                                \
  SoftplusSum pairwise_softplus(const Pairs&, double, View, View, bool, bool, const Run&);     \
  void sample_negatives(const Pairs&, uint64_t, View, const Run&);                             \
  void fdt_pool_forward(const TokenPool&, View, View, View, const Run&);                       \
  double fdt_pool_backward(const TokenPool&, View, View, View, View, View, View, bool,         \
                           const Run&);                                                        \
  PairStats pairwise_stats(View, View, View, double, View, const Run&);                        \
  void pairwise_rank(const Pairs&, View, View, View, View, const Run&);                        \
  void shift_landscape(const Shifted&, const Shifted&, const std::vector<double>&, long, View, \
                       View, const Run&);                                                      \
  void slerp_forward(View, View, View, View, const Run&);                                      \
  void slerp_backward(View, View, View, View, View, View, View, const Run&);                   \
  void sparsemax_forward(View, View, const Run&);                                              \
  void sparsemax_backward(View, View, View, const Run&);                                       \
  double tile_rate(Type, double, int);                                                         \
  double multiply_add_rate(double, int);                                                       \
  }
MMFAST_DECLARE(generic)
#if defined(__x86_64__)
MMFAST_DECLARE(avx2)
MMFAST_DECLARE(avx512)
MMFAST_DECLARE(avx512_bf16)
MMFAST_DECLARE(amx)
#endif
#undef MMFAST_DECLARE

namespace {

#if defined(__x86_64__)
// Linux lets a process have the matrix unit's registers when it asks, once.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  constexpr long kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d = 0;
  static const bool granted = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) &&
                              (d & kTiles) && syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

struct Level {
  const char* name;
  bool (*runs)();
  decltype(&pairwise_lse_forward) forward;
  decltype(&pairwise_lse_backward) backward;
  decltype(&pairwise_lse_mean) mean;
  decltype(&pairwise_softplus) softplus;
  decltype(&sample_negatives) draw;
  decltype(&fdt_pool_forward) pool;
  decltype(&fdt_pool_backward) pool_backward;
  decltype(&pairwise_stats) stats;
  decltype(&pairwise_rank) rank;
  decltype(&shift_landscape) landscape;
  decltype(&slerp_forward) mix;
  decltype(&slerp_backward) mix_backward;
  decltype(&sparsemax_forward) project;
  decltype(&sparsemax_backward) project_backward;
  decltype(&tile_rate) rate;
  decltype(&multiply_add_rate) limit;
};

#define MMFAST_LEVEL_ROW(level, condition)                                                         \
  Level {                                                                                          \
    #level, [] { return bool(condition); }, level::pairwise_lse_forward,                           \
        level::pairwise_lse_backward, level::pairwise_lse_mean, level::pairwise_softplus,          \
        level::sample_negatives, level::fdt_pool_forward, level::fdt_pool_backward,                \
        level::pairwise_stats, level::pairwise_rank, level::shift_landscape, level::slerp_forward, \
        level::slerp_backward, level::sparsemax_forward, level::sparsemax_backward,                \
        level::tile_rate, level::multiply_add_rate                                                 \
  }
const Level kLevels[] = {
    MMFAST_LEVEL_ROW(generic, true),
#if defined(__x86_64__)
    MMFAST_LEVEL_ROW(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                               __builtin_cpu_supports("f16c")),
    MMFAST_LEVEL_ROW(avx512,
                     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                         __builtin_cpu_supports("fma")),
    MMFAST_LEVEL_ROW(avx512_bf16,
                     __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                         __builtin_cpu_supports("fma")),
    MMFAST_LEVEL_ROW(amx, __builtin_cpu_supports("avx512bf16") &&
                              __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512dq") &&
                              __builtin_cpu_supports("avx512vl") && has_amx()),
#endif
};
#undef MMFAST_LEVEL_ROW

const Level& level_named(const std::string& name) {
  std::string known;
  for (const Level& level : kLevels) {
    if (name == level.name && level.runs()) return level;
    if (level.runs()) known += (known.empty() ? "" : ", ") + std::string(level.name);
  }
  throw std::invalid_argument("CPU level '" + name + "' cannot run here; this machine has " +
                              known);
}

const Level& first_level() {
  const char* asked = std::getenv("MMFAST_CPU_ISA");
  return level_named(asked && *asked ? asked : isa_levels().back());
}

std::atomic<const Level*> in_use{nullptr};
const Level& current() { return *in_use.load(std::memory_order_relaxed); }

}  // namespace

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const Level& level : kLevels) {
    if (level.runs()) names.push_back(level.name);
  }
  return names;
}

std::string isa() { return current().name; }

void set_isa(const std::string& name) {
  in_use = name.empty() ? &first_level() : &level_named(name);
}

void pairwise_lse_forward(const Pairs& pairs, View rows, View columns, const Run& run) {
  current().forward(pairs, rows, columns, run);
}

double pairwise_lse_backward(const Pairs& pairs, View g_rows, View g_columns, View rows,
                             View columns, View dq, View dk, bool need_scale, const Run& run) {
  return current().backward(pairs, g_rows, g_columns, rows, columns, dq, dk, need_scale, run);
}

void pairwise_lse_mean(const Pairs& pairs, View rows, View mean, const Run& run) {
  current().mean(pairs, rows, mean, run);
}

SoftplusSum pairwise_softplus(const Pairs& pairs, double bias, View dq, View dk, bool need_scale,
                              bool need_bias, const Run& run) {
  return current().softplus(pairs, bias, dq, dk, need_scale, need_bias, run);
}

void sample_negatives(const Pairs& pairs, uint64_t seed, View indices, const Run& run) {
  current().draw(pairs, seed, indices, run);
}

void fdt_pool_forward(const TokenPool& in, View pooled, View weights, View winners,
                      const Run& run) {
  current().pool(in, pooled, weights, winners, run);
}

double fdt_pool_backward(const TokenPool& in, View g_pooled, View g_weights, View weights,
                         View winners, View d_tokens, View d_codebook, bool need_scale,
                         const Run& run) {
  return current().pool_backward(in, g_pooled, g_weights, weights, winners, d_tokens, d_codebook,
                                 need_scale, run);
}

PairStats pairwise_stats(View x, View y, View edges, double pivot, View counts, const Run& run) {
  return current().stats(x, y, edges, pivot, counts, run);
}

void pairwise_rank(const Pairs& pairs, View threshold, View largest, View index, View above,
                   const Run& run) {
  current().rank(pairs, threshold, largest, index, above, run);
}

void shift_landscape(const Shifted& x, const Shifted& y, const std::vector<double>& scales,
                     long chunk, View rows, View columns, const Run& run) {
  current().landscape(x, y, scales, chunk, rows, columns, run);
}

void slerp_forward(View a, View b, View lam, View out, const Run& run) {
  current().mix(a, b, lam, out, run);
}

void slerp_backward(View g, View a, View b, View lam, View da, View db, View dlam, const Run& run) {
  current().mix_backward(g, a, b, lam, da, db, dlam, run);
}

void sparsemax_forward(View x, View out, const Run& run) { current().project(x, out, run); }

void sparsemax_backward(View g, View p, View dx, const Run& run) {
  current().project_backward(g, p, dx, run);
}

double tile_rate(Type type, double seconds, int threads) {
  return current().rate(type, seconds, threads);
}

double multiply_add_rate(double seconds, int threads) { return current().limit(seconds, threads); }

}  // namespace mmfast
