#include "pages.h"

#include <cstring>

namespace tamis {

int64_t first_from(const Pages& pages, int64_t offset, int64_t low, int64_t high,
                   int64_t position) {
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    int32_t found;
    std::memcpy(&found, pages.row(middle, offset, sizeof found), sizeof found);
    if (found >= position) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace tamis
