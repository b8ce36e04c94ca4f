#include "memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace mmfast {
namespace {

constexpr std::size_t kHuge = std::size_t{1} << 21, kHeader = 64;

// Stands in front of every block.
struct Header {
  std::size_t bytes;
};

struct Shelf {
  std::mutex lock;
  std::vector<Header*> blocks;  // the longest idle first
  std::size_t bytes = 0;
};
// never destroyed: buffers may outlive static destruction
Shelf& shelf() {
  static Shelf* one = new Shelf;
  return *one;
}

void* content(Header* block) { return reinterpret_cast<char*>(block) + kHeader; }

}  // namespace

void* take_block(std::size_t bytes) {
  const std::size_t unit = bytes >= kHuge ? kHuge : kHeader;
  const std::size_t size = (bytes + kHeader + unit - 1) / unit * unit;
  {
    Shelf& s = shelf();
    const std::lock_guard<std::mutex> hold(s.lock);
    for (std::size_t i = s.blocks.size(); i-- > 0;) {
      // the newest that fits without wasting more than an eighth
      Header* block = s.blocks[i];
      if (block->bytes < size || block->bytes > size + size / 8) continue;
      s.blocks.erase(s.blocks.begin() + long(i));
      s.bytes -= block->bytes;
      return content(block);
    }
  }
  auto* block = static_cast<Header*>(std::aligned_alloc(unit, size));
  if (!block) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (unit == kHuge) madvise(block, size, MADV_HUGEPAGE);
#endif
  block->bytes = size;
  return content(block);
}

void expect_writes(void* data, std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr std::size_t kWorthIt = std::size_t{4} << 20, kPage = 4096;
  if (bytes < kWorthIt) return;
  const auto begin = (reinterpret_cast<std::uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

void give_block(void* data) {
  if (!data) return;
  auto* block = reinterpret_cast<Header*>(static_cast<char*>(data) - kHeader);
  std::vector<Header*> leaving;
  {
    Shelf& s = shelf();
    const std::lock_guard<std::mutex> hold(s.lock);
    s.blocks.push_back(block);
    s.bytes += block->bytes;
    while (s.bytes > kKept) {
      leaving.push_back(s.blocks.front());
      s.bytes -= s.blocks.front()->bytes;
      s.blocks.erase(s.blocks.begin());
    }
  }
  for (Header* one : leaving) std::free(one);
}

}  // namespace mmfast
