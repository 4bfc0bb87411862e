// The kernels for the instruction set that the compiler's options choose; TABLE is its name.

#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "predict.h"

extern const Kernels TABLE;
const Kernels TABLE = {
    {attention<float>, attention<bf16>},
    {pack_linear<float>, pack_linear<bf16>},
    {linear<float>, linear<bf16>},
    {pack_predict<float>, pack_predict<bf16>},
    {predict<float>, predict<bf16>},
    finish_predict,
    {rms_norm<float>, rms_norm<bf16>},
    {swiglu<float>, swiglu<bf16>},
    {rope<float>, rope<bf16>},
    ROWS_OF_X,
    COLUMNS,
    POSITIONS,
    IDS,
    FIELDS * POSITIONS,
};
