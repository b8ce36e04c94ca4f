#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// Runs the source of a CUDA kernel on the CPU, for tests: what it computes, in which order its
// threads may come, where they wait for each other. Each thread of a block is a fiber with a stack
// of its own that runs until it waits; then another one does. One block at a time, in one
// dimension; static shared memory. Speed and the memory model are not those of a card.
namespace mmfast::emulator {

// Who runs first is up to the card, so a kernel must be right in every order. `warps` run one warp
// as far as it gets before the next one starts: what a missing barrier is found by.
enum class Order { forward, reverse, random, warps_forward, warps_reverse };
inline constexpr Order kOrders[] = {Order::forward, Order::reverse, Order::random,
                                    Order::warps_forward, Order::warps_reverse};
inline Order order = Order::forward;

// A stack and where it stopped. The address sanitizer is told of every change of stacks.
struct Stack {
  ucontext_t context;
  const void* bottom = nullptr;
  size_t size = 0;
  void* shadow = nullptr;

  void leave([[maybe_unused]] bool for_good, Stack& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &shadow, to.bottom, to.size);
#endif
    swapcontext(&context, &to.context);
    arrive(nullptr);
  }
  // on this stack again, or for the first time; `from` learns where the one before lies
  void arrive([[maybe_unused]] Stack* from) {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom_before = nullptr;
    size_t size_before = 0;
    __sanitizer_finish_switch_fiber(shadow, &bottom_before, &size_before);
    if (from) from->bottom = bottom_before, from->size = size_before;
#endif
  }
};

enum class State { ready, at_barrier, in_warp, done };
enum class Operation { none, sync, shuffle, ballot };

struct Index {
  unsigned x;
};

struct Thread {
  Index index;
  State state = State::ready;
  std::source_location barrier;  // where it waits for the block
  Operation operation = Operation::none;
  unsigned mask = 0;  // with whom it waits in its warp
  int source = 0;     // whose value it wants
  uint64_t given = 0, got = 0;
  Stack stack;
  std::unique_ptr<char[]> memory;

  unsigned lane() const { return index.x % 32; }
  std::string name() const { return "thread " + std::to_string(index.x); }
};

class Block {
 public:
  static constexpr size_t kStackBytes = 32 << 10;

  Block(unsigned threads, const std::function<void()>& kernel) : kernel_(kernel), all_(threads) {
    for (unsigned i = 0; i < threads; ++i) {
      Thread& t = all_[i];
      t.index = {i};
      t.memory.reset(new char[kStackBytes]);
      t.stack.bottom = t.memory.get();
      t.stack.size = kStackBytes;
    }
  }

  void run() {
    for (Thread& t : all_) start(t);
    const unsigned count = unsigned(all_.size()), warps = (count + 31) / 32;
    const auto done = [&] {
      return std::all_of(all_.begin(), all_.end(), [](auto& t) { return t.state == State::done; });
    };
    while (!done()) {
      bool moved = false;
      if (order == Order::warps_forward || order == Order::warps_reverse) {
        for (unsigned k = 0; k < warps; ++k) {
          const unsigned w = order == Order::warps_forward ? k : warps - 1 - k;
          while (advance(w * 32, std::min(count, w * 32 + 32))) moved = true;
        }
      } else {
        moved = advance(0, count);
      }
      if (!moved && !done()) open_barrier();
    }
  }

  Thread& running() { return *running_; }

  // Called by a thread: it stops until the others let it go on.
  void wait(State state) {
    Thread& me = *running_;
    me.state = state;
    me.stack.leave(false, scheduler_);
  }

 private:
  static void enter();

  void start(Thread& t) {
    t.state = State::ready;
    t.stack.shadow = nullptr;
    getcontext(&t.stack.context);
    t.stack.context.uc_stack.ss_sp = t.memory.get();
    t.stack.context.uc_stack.ss_size = kStackBytes;
    t.stack.context.uc_link = nullptr;
    makecontext(&t.stack.context, &Block::enter, 0);
  }

  void resume(Thread& t) {
    running_ = &t;
    scheduler_.leave(false, t.stack);
    if (error_) std::rethrow_exception(error_);
  }

  // Lets threads [begin, end) run to where they wait, then the warps among them that are complete.
  bool advance(unsigned begin, unsigned end) {
    std::vector<Thread*> ready;
    for (unsigned i = begin; i < end; ++i) {
      if (all_[i].state == State::ready) ready.push_back(&all_[i]);
    }
    if (order == Order::reverse || order == Order::warps_reverse) {
      std::reverse(ready.begin(), ready.end());
    }
    if (order == Order::random && !ready.empty()) {
      static std::mt19937 dice(1);
      std::shuffle(ready.begin(), ready.end(), dice);
      ready.resize(1 + dice() % ready.size());  // the others are late
    }
    for (Thread* t : ready) resume(*t);
    bool moved = !ready.empty();
    for (unsigned i = begin; i < end; ++i) {
      if (all_[i].state == State::in_warp) moved |= finish_warp(all_[i]);
    }
    return moved;
  }

  // Ends the warp operation `first` waits in, once every lane of its mask is there.
  bool finish_warp(Thread& first) {
    const unsigned base = first.index.x - first.lane();
    std::vector<Thread*> lanes;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(first.mask >> lane & 1)) continue;
      if (base + lane >= all_.size()) return false;
      Thread& t = all_[base + lane];
      if (t.state != State::in_warp || t.mask != first.mask) return false;
      if (t.operation != first.operation) {
        throw std::runtime_error(t.name() + " and " + first.name() + " meet in different calls");
      }
      lanes.push_back(&t);
    }
    unsigned votes = 0;
    for (const Thread* t : lanes) votes |= unsigned(t->given != 0) << t->lane();
    for (Thread* t : lanes) {
      if (first.operation == Operation::shuffle) {
        if (!(first.mask >> t->source & 1)) {
          throw std::runtime_error(t->name() + " reads lane " + std::to_string(t->source) +
                                   ", which is not in the mask");
        }
        t->got = all_[base + t->source].given;
      } else {
        t->got = votes;
      }
      t->state = State::ready;
    }
    return true;
  }

  // All threads that are left wait. They must be the whole block, at one barrier: stricter than a
  // card, which counts arrivals, and than one that forgives threads that have ended.
  void open_barrier() {
    const Thread& first =
        *std::find_if(all_.begin(), all_.end(), [](auto& t) { return t.state != State::done; });
    for (const Thread& t : all_) {
      const bool here = first.state == State::at_barrier && t.state == State::at_barrier &&
                        t.barrier.line() == first.barrier.line() &&
                        t.barrier.column() == first.barrier.column();
      if (!here) throw std::runtime_error("deadlock: " + story(first) + ", " + story(t));
    }
    for (Thread& t : all_) t.state = State::ready;
  }
  static std::string story(const Thread& t) {
    switch (t.state) {
      case State::at_barrier:
        return t.name() + " waits for the block in line " + std::to_string(t.barrier.line());
      case State::in_warp:
        return t.name() + " waits for lanes of its warp";
      default:
        return t.name() + " has ended";
    }
  }

  const std::function<void()>& kernel_;
  std::vector<Thread> all_;
  Thread* running_ = nullptr;
  Stack scheduler_;
  std::exception_ptr error_;
};

inline Block* block = nullptr;
inline Index block_index, block_size, grid_size;

inline void Block::enter() {
  Thread& me = block->running();
  me.stack.arrive(&block->scheduler_);
  try {
    block->kernel_();
  } catch (...) {
    block->error_ = std::current_exception();
  }
  me.state = State::done;
  me.stack.leave(true, block->scheduler_);
}

// kernel() by every thread of every block. What is wrong with how they wait throws.
inline void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  if (threads > 1024) throw std::runtime_error("a block has at most 1024 threads");
  grid_size = {blocks};
  block_size = {threads};
  const bool last_first = order == Order::reverse || order == Order::warps_reverse;
  Block each(threads, kernel);
  block = &each;
  for (unsigned i = 0; i < blocks; ++i) {
    block_index = {last_first ? blocks - 1 - i : i};
    each.run();
  }
  block = nullptr;
}

inline uint64_t in_warp(Operation operation, unsigned mask, uint64_t given, int source) {
  Thread& me = block->running();
  if (!(mask >> me.lane() & 1)) throw std::runtime_error(me.name() + " is not in its own mask");
  me.operation = operation;
  me.mask = mask;
  me.given = given;
  me.source = source;
  block->wait(State::in_warp);
  return me.got;
}
template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = in_warp(Operation::shuffle, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
inline int lane() { return int(block->running().lane()); }

}  // namespace mmfast::emulator
