// Hopper's instructions: the emulator's side of csrc/cuda/sm90/ptx.cuh.
#pragma once
#include "bulk.h"
#include "mbarrier.h"
#include "stmatrix.h"
#include "tma.h"
#include "wgmma.h"

#define __grid_constant__

namespace simt {

// "setmaxnreg": registers are plenty here.
template <int COUNT> void release_registers() {
    static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "what setmaxnreg takes");
}
template <int COUNT> void acquire_registers() { release_registers<COUNT>(); }

}  // namespace simt

namespace reap::cuda {
using simt::acquire_registers;
using simt::bulk_add;
using simt::bulk_commit;
using simt::bulk_store;
using simt::bulk_wait_read;
using simt::cp_async_mbarrier_arrive;
using simt::fence_mbarrier_init;
using simt::fence_proxy_async;
using simt::kept_tensor_map;
using simt::make_tensor_map;
using simt::mbarrier_arrive;
using simt::mbarrier_arrive_expect;
using simt::mbarrier_init;
using simt::mbarrier_try_wait;
using simt::prefetch_map;
using simt::release_registers;
using simt::shared_address;
using simt::stmatrix_x2_trans;
using simt::TensorMap;
using simt::tma_load;
using simt::tma_prefetch;
using simt::wgmma_commit;
using simt::wgmma_fence;
using simt::wgmma_m64k16;
using simt::wgmma_m64n192k16;
using simt::wgmma_m64n256k16;
using simt::wgmma_wait;
}  // namespace reap::cuda
