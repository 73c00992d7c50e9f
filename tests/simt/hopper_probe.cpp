// One of Hopper's instructions at a time, on operands from standard input, raw:
//   box          rank, sizes [4], strides [4] elements, box [4], at [4], elements of the tensor, all i64;
//                the tensor, u16 -> the box in shared memory
//   wgmma k|mn N   shared memory [40 KB], descriptors a, b u64, d [128, N / 2] f32 by thread -> d, with a
//                  K-major or an MN-major b of N columns, 192 or 256
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

template <int N> void run_wgmma(simt::Emulator& emulator, const std::string& major) {
    const auto image = read<uint4>(IMAGE / 16);
    const auto descriptors = read<uint64_t>(2);
    auto d = read<float>(128 * N / 2);
    emulator.add_buffer("image", image.data(), IMAGE, false);
    emulator.add_buffer("d", d.data(), d.size() * sizeof(float), true);
    emulator.launch(major == "mn" ? multiply<true, N> : multiply<false, N>, 1, 128, IMAGE,
                    Product{image.data(), descriptors[0], descriptors[1], d.data()});
    write(d);
}

int main(int, char** arguments) {
    simt::Emulator emulator;
    if (std::string(arguments[1]) == "box") run_box(emulator);
    else if (std::string(arguments[3]) == "192") run_wgmma<192>(emulator, arguments[2]);
    else run_wgmma<256>(emulator, arguments[2]);
}
