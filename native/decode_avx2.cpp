#include "isa_avx2.h"

namespace tamis {

AttendRange* attend_range_avx2(DType dtype) { return attend_range_for<Avx2>(dtype); }

}  // namespace tamis
