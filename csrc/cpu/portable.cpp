#define REAP_ISA portable
#include "simd_portable.h"
#include "kernels.h"
