// The schedule: every visit once, every group's visitors in one order for any number of threads.
#include <algorithm>
#include <atomic>
#include <vector>

#include "../../csrc/cpu/parallel.h"
#include "check.h"

using namespace mmfast;

namespace {

// Who visited each group, in turn. Members of a team take turns on a group; two on it at once
// would race on its counter here, which the thread sanitizer sees.
std::vector<std::vector<long>> visitors(Grid grid, int threads) {
  std::vector<std::vector<long>> seen(grid.teams() * grid.groups);
  std::vector<long> groups_done(grid.lanes, 0);
  sweep(grid, Run{threads, {}}, [&](long lane, long group, int thread) {
    CHECK(thread >= 0 && thread < threads);
    seen[lane / grid.groups * grid.groups + group].push_back(lane);
    // a lane meets its groups in rotating order, from its own place on
    CHECK(group == (lane % grid.groups + groups_done[lane]) % grid.groups);
    ++groups_done[lane];
  });
  return seen;
}

void test_every_visit_once_in_one_order() {
  for (const Grid grid : {Grid{1, 1}, Grid{1, 5}, Grid{7, 1}, Grid{5, 5}, Grid{8, 3}, Grid{3, 8},
                          Grid{64, 9}, Grid{20, 20}}) {
    const auto alone = visitors(grid, 1);
    for (long team = 0; team < grid.teams(); ++team) {
      const long members = std::min(grid.groups, grid.lanes - team * grid.groups);
      for (long group = 0; group < grid.groups; ++group) {
        auto lanes = alone[team * grid.groups + group];
        std::sort(lanes.begin(), lanes.end());
        CHECK(long(lanes.size()) == members, "%ld x %ld", grid.lanes, grid.groups);
        for (long i = 0; i < members; ++i) CHECK(lanes[i] == team * grid.groups + i);
      }
    }
    for (const int threads : {2, 3, 8}) CHECK(visitors(grid, threads) == alone);
  }
}

void test_for_each_reaches_all() {
  std::vector<std::atomic<int>> hits(1000);
  for_each(1000, Run{3, {}}, [&](long i, int) { ++hits[i]; });
  for (const auto& h : hits) CHECK(h == 1);
}

void test_stop_ends_the_sweep() {
  std::atomic<long> visits{0};
  bool thrown = false;
  try {
    sweep({50, 50}, Run{2, [] { return true; }}, [&](long, long, int) {
      ++visits;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    });
  } catch (const Stopped&) {
    thrown = true;
  }
  CHECK(thrown && visits > 0 && visits < 2500, "%ld visits", visits.load());
}

}  // namespace

int main() {
  test_every_visit_once_in_one_order();
  test_for_each_reaches_all();
  test_stop_ends_the_sweep();
}
