// The kernels for one instruction set, which the compiler's options choose; its name is TABLE.

#include "attention.h"

extern const Kernels TABLE;
const Kernels TABLE = {{attention<float>, attention<bf16>}};
