// One instruction at a time, on operands from standard input, results to standard output, all raw:
//   mma bf16|f16     a [32, 4] u32, b [32, 2] u32, d [32, 4] f32 by lane and register -> d
//   ldmatrix [trans] shared memory [2048] bytes, row of each lane [32] i32 -> registers [32, 4] u32
//   product NK|KN    A [16, 16], B [16, 16] as stored, bf16 bits -> A B [16, 16] f32
//   warp             a value of each lane [32] u32 -> results of shuffles, votes [32, 7] u32
//   wavefronts N     offset of each lane [32] i32, N bytes each -> wavefronts, conflicts as text
#include <cstdio>
#include <string>

#include "emulator.h"

using namespace reap::cuda;

template <typename T, size_t n> void read(T (&items)[n]) {
    if (std::fread(items, sizeof(T), n, stdin) != n) throw std::runtime_error("short input");
}
template <typename T, size_t n> void write(const T (&items)[n]) { std::fwrite(items, sizeof(T), n, stdout); }

struct Mma {
    Global<const uint32_t> a, b;
    Global<float> d;
};

template <typename T> __global__ void multiply(Mma args) {
    const unsigned lane = threadIdx.x;
    uint32_t a[4];
    float d[4];
    for (unsigned i = 0; i < 4; ++i) a[i] = load_global(args.a + lane * 4 + i);
    for (unsigned i = 0; i < 4; ++i) d[i] = load_global(args.d + lane * 4 + i);
    const uint32_t b0 = load_global(args.b + lane * 2), b1 = load_global(args.b + lane * 2 + 1);
    mma_m16n8k16<T>(d, a, b0, b1);
    for (unsigned i = 0; i < 4; ++i) store_global(args.d + lane * 4 + i, d[i]);
}

struct Load {
    Global<const uint4> image;
    Global<const int> rows;
    Global<uint32_t> registers;
};

template <bool transposed> __global__ void load(Load args) {
    const unsigned lane = threadIdx.x;
    for (unsigned i = lane; i < 128; i += 32)
        store_shared(cast<uint4>(shared_memory()) + i, load_global(args.image + i));
    __syncwarp();
    uint32_t r[4];
    const auto row = shared_memory() + load_global(args.rows + lane);
    if (transposed) ldmatrix_x4_trans(r, row);
    else ldmatrix_x4(r, row);
    for (unsigned i = 0; i < 4; ++i) store_global(args.registers + lane * 4 + i, r[i]);
}

struct Product {
    Global<const uint4> a, b;
    Global<float> d;
};

// Both operands through shared memory, rows of 32 bytes, as the fragments of the engine are loaded.
template <bool k_rows> __global__ void product(Product args) {
    const unsigned lane = threadIdx.x;
    const auto a = shared_memory(), b = a + 512;
    store_shared(cast<uint4>(a) + lane, load_global(args.a + lane));
    store_shared(cast<uint4>(b) + lane, load_global(args.b + lane));
    __syncwarp();
    uint32_t ra[4], rb[4];
    ldmatrix_x4(ra, a + lane % 16 * 32 + lane / 16 * 16);
    if (k_rows) ldmatrix_x4_trans(rb, b + lane % 16 * 32 + lane / 16 * 16);
    else ldmatrix_x4(rb, b + (lane % 8 + lane / 16 * 8) * 32 + lane / 8 % 2 * 16);
    for (unsigned half = 0; half < 2; ++half) {
        float d[4] = {};
        mma_m16n8k16<bf16>(d, ra, rb[half * 2], rb[half * 2 + 1]);
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned row = lane / 4 + i / 2 * 8, column = half * 8 + lane % 4 * 2 + i % 2;
            store_global(args.d + row * 16 + column, d[i]);
        }
    }
}

struct Exchange {
    Global<const uint32_t> values;
    Global<uint32_t> results;
};

__global__ void exchange(Exchange args) {
    const unsigned lane = threadIdx.x, all = 0xffffffff;
    const uint32_t x = load_global(args.values + lane);
    const uint32_t results[7] = {
        __shfl_sync(all, x, static_cast<int>(x % 64)),
        __shfl_sync(all, x, 3, 8),
        __shfl_xor_sync(all, x, 5),
        __shfl_up_sync(all, x, 3),
        __shfl_down_sync(all, x, 4, 16),
        __ballot_sync(all, x % 2 == 1),
        __match_any_sync(all, x % 4),
    };
    for (unsigned i = 0; i < 7; ++i) store_global(args.results + lane * 7 + i, results[i]);
}

template <typename T> __global__ void loads(Global<const int> offsets) {
    for (unsigned i = threadIdx.x; i < 1024; i += 32) store_shared(cast<uint4>(shared_memory()) + i, uint4{});
    __syncwarp();
    load_shared(cast<T>(shared_memory() + load_global(offsets + threadIdx.x)));
}

void run_wavefronts(const std::string& bytes) {
    int offsets[32];
    read(offsets);
    simt::Options options;
    options.profile = true;
    simt::Emulator emulator(options);
    emulator.add_buffer("offsets", offsets, sizeof(offsets), false);
    const auto kernel = bytes == "4" ? loads<float> : bytes == "8" ? loads<float2> : loads<float4>;
    emulator.launch(kernel, 1, 32, 16384, offsets);
    for (const auto& [site, use] : emulator.counters.shared)
        if (use.what == "load")
            std::printf("%u %u\n", static_cast<unsigned>(use.wavefronts), static_cast<unsigned>(use.conflicts));
}

int main(int count, char** arguments) {
    const std::string mode = arguments[1], variant = count > 2 ? arguments[2] : "";
    if (mode == "wavefronts") return run_wavefronts(variant), 0;
    simt::Emulator emulator;
    const auto buffer = [&](const char* name, auto& items, bool output = false) {
        if (!output) read(items);
        emulator.add_buffer(name, items, sizeof(items), output || name[0] == 'd', !output);
    };
    if (mode == "mma") {
        uint32_t a[128], b[64];
        float d[128];
        buffer("a", a), buffer("b", b), buffer("d", d);
        emulator.launch(variant == "f16" ? multiply<f16> : multiply<bf16>, 1, 32, 0, Mma{a, b, d});
        write(d);
    } else if (mode == "ldmatrix") {
        uint4 image[128];
        int rows[32];
        uint32_t registers[128];
        buffer("image", image), buffer("rows", rows), buffer("registers", registers, true);
        emulator.launch(variant == "trans" ? load<true> : load<false>, 1, 32, 2048, Load{image, rows, registers});
        write(registers);
    } else if (mode == "warp") {
        uint32_t values[32], results[224];
        buffer("values", values), buffer("results", results, true);
        emulator.launch(exchange, 1, 32, 0, Exchange{values, results});
        write(results);
    } else {
        uint4 a[32], b[32];
        float d[256];
        buffer("a", a), buffer("b", b), buffer("out", d, true);
        emulator.launch(variant == "KN" ? product<true> : product<false>, 1, 32, 1024, Product{a, b, d});
        write(d);
    }
}
