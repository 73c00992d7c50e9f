// `Layer` as a Python class: raw addresses, sizes and strides, nothing of torch. Every extension module
// that takes a Layer has a class of its own (module_local): they can be loaded side by side.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

#include "layer.h"

namespace reap {

namespace py = pybind11;

// A pointer member as a Python integer; 0 is null.
template <class C, class T> void def_address(py::class_<C>& type, const char* name, T* C::*member) {
    type.def_property(
        name, [member](const C& self) { return reinterpret_cast<uintptr_t>(self.*member); },
        [member](C& self, uintptr_t address) { self.*member = reinterpret_cast<T*>(address); });
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

    py::class_<Weights> weights(m, "Weights", py::module_local());
    weights.def(py::init<>())
        .def_readwrite("expert_stride", &Weights::expert_stride)
        .def_readwrite("row_stride", &Weights::row_stride)
        .def_readwrite("k_stride", &Weights::k_stride)
        .def_readwrite("bias_expert_stride", &Weights::bias_expert_stride)
        .def_readwrite("bias_row_stride", &Weights::bias_row_stride);
    def_address(weights, "data", &Weights::data);
    def_address(weights, "bias", &Weights::bias);

    py::class_<Layer> layer(m, "Layer", py::module_local());
    layer.def(py::init<>())
        .def_readwrite("T", &Layer::T)
        .def_readwrite("K", &Layer::K)
        .def_readwrite("E", &Layer::E)
        .def_readwrite("H", &Layer::H)
        .def_readwrite("I", &Layer::I)
        .def_readwrite("dtype", &Layer::dtype)
        .def_readwrite("activation", &Layer::activation)
        .def_readwrite("alpha", &Layer::alpha)
        .def_readwrite("limit", &Layer::limit)
        .def_readwrite("offset", &Layer::offset)
        .def_readwrite("gated", &Layer::gated)
        .def_readwrite("interleaved", &Layer::interleaved)
        .def_readwrite("hidden_stride", &Layer::hidden_stride)
        .def_readwrite("gate_up", &Layer::gate_up)
        .def_readwrite("down", &Layer::down)
        .def_readwrite("threads", &Layer::threads)
        .def_readwrite("deterministic", &Layer::deterministic)
        .def_readwrite("device", &Layer::device)
        .def_readwrite("sm", &Layer::sm)
        .def_readwrite("processors", &Layer::processors)
        .def_readwrite("cache_bytes", &Layer::cache_bytes)
        .def_readwrite("wgmma", &Layer::wgmma);
    def_address(layer, "hidden", &Layer::hidden);
    def_address(layer, "top_k_index", &Layer::top_k_index);
    def_address(layer, "top_k_weights", &Layer::top_k_weights);
    def_address(layer, "out", &Layer::out);
    def_address(layer, "norms", &Layer::norms);
    def_address(layer, "peaks", &Layer::peaks);
}

}  // namespace reap
