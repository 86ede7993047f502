// The calling thread's place in its team, also where there is no OpenMP.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace tamis {

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

inline int team_size() {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// Calls each(begin, end) for the share that member `index` of a team of `count` has of `n` things,
// in units of `unit`; not at all where it has none.
template <class Each>
void share(int64_t n, int64_t unit, int index, int count, Each each) {
  const int64_t units = (n + unit - 1) / unit;
  const int64_t begin = units * index / count * unit;
  const int64_t end = std::min(n, units * (index + 1) / count * unit);
  if (begin < end) each(begin, end);
}

// Until every thread of the team is here.
inline void wait_for_team() {
#pragma omp barrier
}

}  // namespace tamis
