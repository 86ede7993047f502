#include "isa_portable.h"

namespace tamis {

AttendRange* attend_range_portable(DType dtype) { return attend_range_for<Portable>(dtype); }

}  // namespace tamis
