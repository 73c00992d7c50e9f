// One of Hopper's instructions at a time, on operands from standard input, raw:
//   box          rank, sizes [4], strides [4] elements, box [4], at [4], elements of the tensor, all i64;
//                the tensor, u16 -> the box in shared memory
//   wgmma k|mn N   shared memory [40 KB], descriptors a, b u64, d [128, N / 2] f32 by thread -> d, with a
//                  K-major or an MN-major b of N columns, 192 or 256
//   narrow k|mn 8|24|128   the same of m64nNk16, with a K-major or an MN-major a
//   stmatrix     two registers of each lane, [32, 2] u32 -> two matrices, 16 rows of 16 bytes
#include <cstdio>
#include <string>
#include <vector>

#include "../../csrc/cuda/sm90/ptx.cuh"
#include "emulator.h"

using namespace reap::cuda;

template <typename T> std::vector<T> read(size_t count) {
    std::vector<T> items(count);
    if (std::fread(items.data(), sizeof(T), count, stdin) != count) throw std::runtime_error("short input");
    return items;
}
template <typename T> void write(const std::vector<T>& items) {
    std::fwrite(items.data(), sizeof(T), items.size(), stdout);
}

struct Box {
    TensorMap map;
    int at[4], bytes;
    Global<uint4> image;
};

template <int RANK> __global__ void load_box(Box args) {
    const auto barrier = cast<uint64_t>(shared_memory() + args.bytes);
    if (threadIdx.x == 0) {
        int at[RANK];
        for (int i = 0; i < RANK; ++i) at[i] = args.at[i];
        mbarrier_init(barrier, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect(barrier, args.bytes);
        tma_load(shared_memory(), args.map, barrier, at);
    }
    __syncthreads();
    while (!mbarrier_try_wait(barrier, 0)) {
    }
    for (int i = threadIdx.x; i < args.bytes / 16; i += 32)
        store_global(args.image + i, load_shared(cast<uint4>(shared_memory()) + i));
}

struct Product {
    Global<const uint4> image;
    uint64_t a, b;
    Global<float> d;
};
constexpr int IMAGE = 40 << 10;

template <bool B_MN_MAJOR, int N> __global__ void multiply(Product args) {
    for (int i = threadIdx.x; i < IMAGE / 16; i += 128)
        store_shared(cast<uint4>(shared_memory()) + i, load_global(args.image + i));
    fence_proxy_async();
    __syncthreads();
    float d[N / 64][8][4];
    const auto each = [&](auto visit) {
        for (int i = 0; i < N / 2; ++i) visit(d[i / 32][i / 4 % 8][i % 4], args.d + (threadIdx.x * (N / 2) + i));
    };
    each([](float& x, Global<float> p) { x = load_global(p); });
    wgmma_fence();
    if constexpr (N == 192) wgmma_m64n192k16<bf16, B_MN_MAJOR>(d, args.a, args.b, true);
    else wgmma_m64n256k16<bf16, B_MN_MAJOR>(d, args.a, args.b, true);
    wgmma_commit();
    wgmma_wait<0>();
    each([](float& x, Global<float> p) { store_global(p, x); });
}

template <bool A_MN_MAJOR, int N> __global__ void multiply_narrow(Product args) {
    for (int i = threadIdx.x; i < IMAGE / 16; i += 128)
        store_shared(cast<uint4>(shared_memory()) + i, load_global(args.image + i));
    fence_proxy_async();
    __syncthreads();
    float d[16][4];
    const Global<float> mine = args.d + threadIdx.x * (N / 2);
    for (int i = 0; i < N / 2; ++i) d[i / 4][i % 4] = load_global(mine + i);
    wgmma_fence();
    wgmma_m64k16<bf16, A_MN_MAJOR, N>(d, args.a, args.b);
    wgmma_commit();
    wgmma_wait<0>();
    for (int i = 0; i < N / 2; ++i) store_global(mine + i, d[i / 4][i % 4]);
}

struct Matrices {
    Global<const uint2> registers;
    Global<uint4> rows;
};

__global__ void store_matrices(Matrices args) {
    const uint2 mine = load_global(args.registers + threadIdx.x);
    const auto rows = cast<uint4>(shared_memory());
    stmatrix_x2_trans(cast<char>(rows + threadIdx.x % 16), {mine.x, mine.y});
    __syncwarp();
    if (threadIdx.x < 16) store_global(args.rows + threadIdx.x, load_shared(rows + threadIdx.x));
}

void run_box(simt::Emulator& emulator) {
    const auto numbers = read<int64_t>(18);
    const int rank = static_cast<int>(numbers[0]);
    const auto tensor = read<uint16_t>(numbers[17]);
    emulator.add_buffer("tensor", tensor.data(), tensor.size() * 2, false);
    TensorBox box{reinterpret_cast<const char*>(tensor.data()), rank, {}, {}, {}};
    Box args{};
    args.bytes = 2;
    for (int i = 0; i < rank; ++i) {
        box.sizes[i] = numbers[1 + i], box.strides[i] = numbers[5 + i];
        box.box[i] = static_cast<int>(numbers[9 + i]), args.at[i] = static_cast<int>(numbers[13 + i]);
        args.bytes *= box.box[i];
    }
    std::vector<uint4> image(args.bytes / 16);
    emulator.add_buffer("image", image.data(), args.bytes, true, false);
    args.map = make_tensor_map(box);
    args.image = image.data();
    const auto kernel = rank == 2 ? load_box<2> : rank == 3 ? load_box<3> : load_box<4>;
    emulator.launch(kernel, 1, 32, args.bytes + 8, args);
    write(image);
}

void run_wgmma(simt::Emulator& emulator, void (*kernel)(Product), int columns) {
    const auto image = read<uint4>(IMAGE / 16);
    const auto descriptors = read<uint64_t>(2);
    auto d = read<float>(64 * columns);
    emulator.add_buffer("image", image.data(), IMAGE, false);
    emulator.add_buffer("d", d.data(), d.size() * sizeof(float), true);
    emulator.launch(kernel, 1, 128, IMAGE, Product{image.data(), descriptors[0], descriptors[1], d.data()});
    write(d);
}

template <int N> void run_narrow(simt::Emulator& emulator, bool mn_major) {
    run_wgmma(emulator, mn_major ? multiply_narrow<true, N> : multiply_narrow<false, N>, N);
}

void run_stmatrix(simt::Emulator& emulator) {
    const auto registers = read<uint2>(32);
    std::vector<uint4> rows(16);
    emulator.add_buffer("registers", registers.data(), registers.size() * sizeof(uint2), false);
    emulator.add_buffer("rows", rows.data(), rows.size() * sizeof(uint4), true);
    emulator.launch(store_matrices, 1, 32, 256, Matrices{registers.data(), rows.data()});
    write(rows);
}

int main(int, char** arguments) {
    simt::Emulator emulator;
    const std::string instruction = arguments[1];
    if (instruction == "box") return run_box(emulator), 0;
    if (instruction == "stmatrix") return run_stmatrix(emulator), 0;
    const bool mn_major = std::string(arguments[2]) == "mn";
    const std::string columns = arguments[3];
    if (columns == "192") run_wgmma(emulator, mn_major ? multiply<true, 192> : multiply<false, 192>, 192);
    else if (columns == "256") run_wgmma(emulator, mn_major ? multiply<true, 256> : multiply<false, 256>, 256);
    else if (columns == "8") run_narrow<8>(emulator, mn_major);
    else if (columns == "24") run_narrow<24>(emulator, mn_major);
    else run_narrow<128>(emulator, mn_major);
}
