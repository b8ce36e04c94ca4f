#include "parallel.h"

namespace mmfast {

// Results do not depend on the order within its freedom, so it is chosen for the cache. Going step
// by step through all lanes meets nothing twice soon. Instead eight lanes, from the last ones down,
// go through all their steps: they stay, and a group serves each of the eight before it leaves.
// Steps that come round to the first groups wait for a second pass, since they depend on the first
// lanes. Many threads would wait for each other in eight lanes; they take all lanes at once.
std::vector<Visit> visit_order(Grid grid, int threads) {
  const long groups = grid.groups, members = grid.teams() * groups;
  const bool few = threads <= 4;
  const long together = few ? 8 : members;
  std::vector<Visit> order;
  order.reserve(members * groups);
  for (int pass = 0; pass < (few ? 2 : 1); ++pass) {
    for (long end = members; end > 0; end -= together) {
      for (long step = 0; step < groups; ++step) {
        for (long m = end - 1; m >= std::max<long>(0, end - together); --m) {
          const bool round = m % groups + step >= groups;
          if (!few || round == (pass == 1)) order.push_back({int(m), int(step)});
        }
      }
    }
  }
  return order;
}

}  // namespace mmfast
