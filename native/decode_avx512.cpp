#include "isa_avx512.h"

namespace tamis {

AttendRange* attend_range_avx512(DType dtype) { return attend_range_for<Avx512>(dtype); }

}  // namespace tamis
