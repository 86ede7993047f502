// Vectors of integers beside those of floats of an instruction set `Isa` (isa_*.h): as many bytes,
// read as 16-bit numbers or as their 32-bit sums. Each instruction set specializes this; what they
// all offer stands in ints_portable.h.
#pragma once

namespace tamis {

template <class Isa>
struct Ints;

}  // namespace tamis
