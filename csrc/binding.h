// `Layer` as a Python class: raw addresses, sizes and strides, nothing of torch. Every extension module
// that takes a Layer has a class of its own (module_local): they can be loaded side by side.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

#include "layer.h"

namespace reap {

namespace py = pybind11;

template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

// From the fields that every engine takes, in their order. One call with many arguments costs a tenth
// of as many assignments; an address of 0 is null.
inline Layer make_layer(int64_t T, int64_t K, int64_t E, int64_t H, int64_t I, Dtype dtype, Activation activation,
                        float alpha, float limit, float offset, bool gated, bool interleaved, uintptr_t hidden,
                        int64_t hidden_stride, const Weights& gate_up, const Weights& down, uintptr_t top_k_index,
                        bool wide_ids, uintptr_t top_k_weights, Dtype gates, uintptr_t out, uintptr_t norms,
                        uintptr_t peaks) {
    Layer layer{};
    layer.T = T, layer.K = K, layer.E = E, layer.H = H, layer.I = I;
    layer.dtype = dtype, layer.activation = activation;
    layer.alpha = alpha, layer.limit = limit, layer.offset = offset;
    layer.gated = gated, layer.interleaved = interleaved;
    layer.hidden = pointer<const char>(hidden), layer.hidden_stride = hidden_stride;
    layer.gate_up = gate_up, layer.down = down;
    layer.top_k_index = pointer<const void>(top_k_index), layer.wide_ids = wide_ids;
    layer.top_k_weights = pointer<const void>(top_k_weights), layer.gates = gates;
    layer.out = pointer<char>(out), layer.norms = pointer<float>(norms), layer.peaks = pointer<float>(peaks);
    return layer;
}

inline void bind_layer(py::module_& m) {
    py::enum_<Dtype>(m, "Dtype", py::module_local())
        .value("bf16", Dtype::bf16)
        .value("f16", Dtype::f16)
        .value("f32", Dtype::f32);
    py::enum_<Activation>(m, "Activation", py::module_local())
        .value("silu", Activation::silu)
        .value("gelu", Activation::gelu)
        .value("gelu_tanh", Activation::gelu_tanh)
        .value("relu", Activation::relu)
        .value("relu2", Activation::relu2)
        .value("swiglu_clamped", Activation::swiglu_clamped);

    py::class_<Weights>(m, "Weights", py::module_local())
        .def(py::init([](uintptr_t data, int64_t expert_stride, int64_t row_stride, int64_t k_stride, uintptr_t bias,
                         int64_t bias_expert_stride, int64_t bias_row_stride) {
            return Weights{pointer<const char>(data), expert_stride,      row_stride,     k_stride,
                           pointer<const char>(bias), bias_expert_stride, bias_row_stride};
        }));
    py::class_<Layer>(m, "Layer", py::module_local())
        .def(py::init(&make_layer))
        .def("without_norms", [](Layer& layer) { layer.norms = layer.peaks = nullptr; })
        .def("on_cpu", [](Layer& layer, int threads) { layer.threads = threads; })
        .def("on_gpu", [](Layer& layer, bool deterministic, bool wgmma, int device, int sm, int processors,
                          int64_t cache_bytes) {
            layer.deterministic = deterministic, layer.wgmma = wgmma;
            layer.device = device, layer.sm = sm, layer.processors = processors, layer.cache_bytes = cache_bytes;
        });
}

}  // namespace reap
