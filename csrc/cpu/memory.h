#pragma once
#include <cstddef>
#include <utility>

// Scratch memory. Fresh pages cost as much as a tenth of a loss (each is cleared by the kernel at
// its first touch), so blocks stay for the next call: at most kKept bytes of them.
namespace mmfast {

constexpr std::size_t kKept = std::size_t{256} << 20;

// Aligned for vectors, not cleared; large blocks are in huge pages where the system has them.
void* take_block(std::size_t bytes);
void give_block(void* block);

// Somebody else's memory that is about to be written whole: in huge pages where it is new and
// large, as numpy does with its arrays from this size on. Each fresh page of 4 KiB costs as much as
// writing it a few times over.
void expect_writes(void* data, std::size_t bytes);

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(long count) : data_(static_cast<T*>(take_block(count * sizeof(T)))) {}
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() { give_block(data_); }
  operator T*() const { return data_; }

 private:
  T* data_ = nullptr;
};

}  // namespace mmfast
