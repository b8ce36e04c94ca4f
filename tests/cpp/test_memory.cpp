// Scratch blocks: aligned, kept for the next call of about the same size, and not without end.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <set>
#include <vector>

#include "../../csrc/cpu/memory.h"
#include "check.h"

using namespace mmfast;

int main() {
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{4000}, std::size_t{3} << 20}) {
    void* block = take_block(bytes);
    CHECK(reinterpret_cast<std::uintptr_t>(block) % 64 == 0);
    std::memset(block, 1, bytes);
    give_block(block);
    void* again = take_block(bytes);
    CHECK(again == block, "a block of %zu bytes was not kept", bytes);
    void* other = take_block(bytes);
    CHECK(other != again, "one block was handed out twice");
    give_block(other);
    give_block(again);
  }
  // a much larger block does not serve a small request
  void* large = take_block(std::size_t{64} << 20);
  give_block(large);
  void* small = take_block(std::size_t{8} << 20);
  CHECK(small != large);
  give_block(small);
  // past the limit the longest idle go: of six blocks of 64 MiB at most four stay
  std::vector<void*> blocks;
  for (int i = 0; i < 6; ++i) blocks.push_back(take_block(std::size_t{63} << 20));
  for (void* block : blocks) give_block(block);
  void* newest = take_block(std::size_t{63} << 20);
  CHECK(newest == blocks.back());
  give_block(newest);
  give_block(nullptr);
  // an expectation changes nothing, wherever the memory begins and ends
  std::vector<char> text(std::size_t{9} << 20, 'x');
  expect_writes(text.data() + 1, text.size() - 5);
  expect_writes(text.data(), 3);
  CHECK(std::all_of(text.begin(), text.end(), [](char c) { return c == 'x'; }));
  Buffer<double> buffer(10), moved(std::move(buffer));
  CHECK(static_cast<double*>(buffer) == nullptr && static_cast<double*>(moved) != nullptr);
}
