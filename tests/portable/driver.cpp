// One call of the CPU engine without Python, for processors that are not here: reads the call from stdin, as
// tests/compilers.py writes it, and writes out, norms and peaks.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

#include "cpu/engine.h"

namespace {

using Memory = std::vector<char>;
std::deque<Memory> memories;  // what the layer points to

void require(bool read) {
    if (read) return;
    std::fputs("the call on stdin is not whole\n", stderr);
    std::exit(2);
}

int64_t integer() {
    long long x;
    require(std::scanf("%lld", &x) == 1);
    return x;
}

float real() {  // also "inf"
    float x;
    require(std::scanf("%f", &x) == 1);
    return x;
}

const char* tensor() {  // its bytes, after their number and a line's end; none is null
    const size_t size = static_cast<size_t>(integer());
    require(std::getchar() == '\n');
    if (size == 0) return nullptr;
    Memory& memory = memories.emplace_back(size);
    require(std::fread(memory.data(), 1, size, stdin) == size);
    return memory.data();
}

reap::Weights weights() {
    reap::Weights w;
    w.expert_stride = integer();
    w.row_stride = integer();
    w.k_stride = integer();
    w.bias_expert_stride = integer();
    w.bias_row_stride = integer();
    w.data = tensor();
    w.bias = tensor();
    return w;
}

template <class T> T* poisoned(Memory& memory, int64_t size) {
    memory.assign(static_cast<size_t>(size) * sizeof(T), '\xff');  // NaN in every dtype
    return reinterpret_cast<T*>(memory.data());
}

}  // namespace

int main() {
    reap::Layer layer = {};
    for (int64_t* size : {&layer.T, &layer.K, &layer.E, &layer.H, &layer.I}) *size = integer();
    layer.dtype = static_cast<reap::Dtype>(integer());
    layer.activation = static_cast<reap::Activation>(integer());
    for (float* number : {&layer.alpha, &layer.limit, &layer.offset}) *number = real();
    layer.gated = integer();
    layer.interleaved = integer();
    layer.threads = static_cast<int>(integer());
    layer.hidden_stride = integer();
    layer.hidden = tensor();
    layer.gate_up = weights();
    layer.down = weights();
    layer.top_k_index = tensor();
    layer.top_k_weights = tensor();

    Memory out, norms, peaks;
    layer.out = poisoned<char>(out, layer.T * layer.H * (layer.dtype == reap::Dtype::f32 ? 4 : 2));
    layer.norms = poisoned<float>(norms, layer.T * layer.K);
    layer.peaks = poisoned<float>(peaks, layer.T * layer.K);
    reap::run_layer(layer, nullptr);
    for (const Memory* result : {&out, &norms, &peaks})
        if (!result->empty()) std::fwrite(result->data(), 1, result->size(), stdout);
    return std::fflush(stdout) ? 1 : 0;
}
