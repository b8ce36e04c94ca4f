#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../ops.h"

// Threads, and the one schedule that makes results independent of how many there are.
// OpenMP (torch's own pool); std::thread in the ThreadSanitizer build, which cannot see into
// libgomp.
namespace mmfast {

template <class Body>
void on_threads(int threads, Body body) {
#if defined(MMFAST_STD_THREADS)
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) pool.emplace_back(body, t);
  body(0);
  for (auto& one : pool) one.join();
#else
#pragma omp parallel num_threads(threads)
  {
    int t = 0;
#if defined(_OPENMP)
    t = omp_get_thread_num();
#endif
    body(t);
  }
#endif
}

// Lanes of rows times groups of columns. Lanes come in teams of as many lanes as there are groups;
// at step s, member u of a team visits group (u + s) mod groups. So no two members of a team are
// ever on one group at a step, and every lane meets its groups, every group its lanes in one order.
struct Grid {
  long lanes, groups;
  long teams() const { return (lanes + groups - 1) / groups; }
};

struct Visit {
  int member, step;
};

// All visits, each after the two it depends on: its lane's and its group's step before.
std::vector<Visit> visit_order(Grid grid, int threads);

// work(lane, group, thread) once for each lane and group. Visits are handed out in order; one waits
// until the two it depends on are done. No barrier, and none waits for one not handed out yet.
template <class Work>
void sweep(Grid grid, const Run& run, Work work) {
  const long groups = grid.groups, members = grid.teams() * groups;
  const std::vector<Visit> order = visit_order(grid, run.threads);
  const long visits = long(order.size());
  std::unique_ptr<std::atomic<long>[]> done(new std::atomic<long>[members]);
  for (long i = 0; i < members; ++i) done[i].store(0, std::memory_order_relaxed);
  std::atomic<long> next{0};
  std::atomic<bool> stopped{false};
  const auto wait = [&](long member, long steps) {
    for (int spin = 0; done[member].load(std::memory_order_acquire) < steps; ++spin) {
      if (stopped.load(std::memory_order_relaxed)) return;
      if (spin > 1000) std::this_thread::yield();
    }
  };
  on_threads(std::max<long>(1, std::min<long>(run.threads, visits)), [&](int thread) {
    auto asked = std::chrono::steady_clock::now();
    for (;;) {
      const long turn = next.fetch_add(1, std::memory_order_relaxed);
      if (turn >= visits || stopped.load(std::memory_order_relaxed)) return;
      const auto [member, step] = order[turn];
      const long mate = member % groups, first = member - mate;
      wait(member, step);
      wait(first + (mate + 1) % groups, step);
      if (stopped.load(std::memory_order_relaxed)) return;
      if (member < grid.lanes) work(long(member), (mate + step) % groups, thread);
      done[member].store(step + 1, std::memory_order_release);
      if (thread != 0 || !run.stop) continue;
      const auto now = std::chrono::steady_clock::now();
      if (now - asked < std::chrono::milliseconds(50)) continue;
      asked = now;
      if (run.stop()) stopped.store(true, std::memory_order_relaxed);
    }
  });
  if (stopped.load()) throw Stopped{};
}

// work(i, thread) for i in [0, count), in any order.
template <class Work>
void for_each(long count, const Run& run, Work work) {
  sweep({count, 1}, run, [&](long i, long, int thread) { work(i, thread); });
}

}  // namespace mmfast
