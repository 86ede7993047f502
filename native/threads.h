// The calling thread's place in its team, also where there is no OpenMP.
#pragma once

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

// Until every thread of the team is here.
inline void wait_for_team() {
#pragma omp barrier
}

}  // namespace tamis
