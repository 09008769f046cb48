/* What a library tells of itself before any of its code runs: tritonbnn/compiled/loader.py asks. */
#include "engine.h"

EXPORT const int64_t tritonbnn_abi = TRITONBNN_ABI;
EXPORT const char tritonbnn_isa[] = TRITONBNN_ISA;
