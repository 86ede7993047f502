// The index of the calling thread in its team.
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

}  // namespace tamis
