// A `Layer` on its way from Python, and nothing of torch: one bytes object of 8-byte numbers, which
// costs a tenth of an object with as many attributes.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <type_traits>

#include "layer.h"

namespace reap {

namespace py = pybind11;

// Takes one number after the other: doubles for floats, int64 for all else. An address of 0 is null.
class Numbers {
public:
    explicit Numbers(std::string_view bytes) : left(bytes) {}

    template <class... Fields> Numbers& read(Fields&... fields) {
        (read_one(fields), ...);
        return *this;
    }
    Numbers& read(Weights& w) {
        return read(w.data, w.expert_stride, w.row_stride, w.k_stride, w.bias, w.bias_expert_stride, w.bias_row_stride);
    }
    void end() const { require(left.empty()); }

private:
    std::string_view left;

    static void require(bool right) {
        if (!right) throw std::invalid_argument("a layer with the wrong number of fields: this is another build's");
    }
    template <class T> void read_one(T& field) {
        std::conditional_t<std::is_floating_point_v<T>, double, int64_t> number;
        require(left.size() >= sizeof number);
        std::memcpy(&number, left.data(), sizeof number);
        left.remove_prefix(sizeof number);
        if constexpr (std::is_pointer_v<T>) field = reinterpret_cast<T>(static_cast<uintptr_t>(number));
        else field = static_cast<T>(number);
    }
};

// In the order of reap_kernels/native.py: layer().
inline Layer read_layer(std::string_view bytes) {
    Layer layer{};
    Numbers(bytes)
        .read(layer.T, layer.K, layer.E, layer.H, layer.I, layer.dtype, layer.activation, layer.gated,
              layer.interleaved)
        .read(layer.hidden, layer.hidden_stride)
        .read(layer.gate_up)
        .read(layer.down)
        .read(layer.top_k_index, layer.wide_ids, layer.top_k_weights, layer.gates)
        .read(layer.out, layer.norms, layer.peaks)
        .read(layer.sum_weights, layer.channel_sums, layer.output_sums)
        .read(layer.threads, layer.deterministic, layer.wgmma, layer.form)
        .read(layer.device, layer.sm, layer.processors, layer.cache_bytes)
        .read(layer.alpha, layer.limit, layer.offset)
        .end();
    return layer;
}

// The numbers of the enumerations in there, by their names.
inline void bind_layer(py::module_& m) {
    py::dict dtypes, activations, forms;
    const auto number = [](auto value) { return static_cast<int>(value); };
    dtypes["bf16"] = number(Dtype::bf16), dtypes["f16"] = number(Dtype::f16), dtypes["f32"] = number(Dtype::f32);
    activations["silu"] = number(Activation::silu);
    activations["gelu"] = number(Activation::gelu);
    activations["gelu_tanh"] = number(Activation::gelu_tanh);
    activations["relu"] = number(Activation::relu);
    activations["relu2"] = number(Activation::relu2);
    activations["swiglu_clamped"] = number(Activation::swiglu_clamped);
    forms["automatic"] = number(Form::automatic);
    forms["cooperative"] = number(Form::cooperative);
    forms["pingpong"] = number(Form::pingpong);
    forms["swapped"] = number(Form::swapped);
    m.attr("dtypes") = dtypes;
    m.attr("forms") = forms;
    m.attr("activations") = activations;
}

}  // namespace reap
