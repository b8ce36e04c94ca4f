#include "../../csrc/levels.h"

// Runs `<level>::test()` (test_level.cpp) for each level of this machine.
#define MMFAST_DECLARE(level) \
  namespace mmfast::level {   \
  void test();                \
  }
MMFAST_DECLARE(generic)
#if defined(__x86_64__)
MMFAST_DECLARE(avx2)
MMFAST_DECLARE(avx512)
MMFAST_DECLARE(avx512_bf16)
MMFAST_DECLARE(amx)
#endif

void test_every_level() {
  for (const auto& name : mmfast::isa_levels()) {
    if (name == "generic") mmfast::generic::test();
#if defined(__x86_64__)
    if (name == "avx2") mmfast::avx2::test();
    if (name == "avx512") mmfast::avx512::test();
    if (name == "avx512_bf16") mmfast::avx512_bf16::test();
    if (name == "amx") mmfast::amx::test();
#endif
  }
}
