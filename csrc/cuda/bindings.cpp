// The extension module reap_kernels._cuda: imports without a driver.
#include <pybind11/stl.h>

#include <string>

#include "../binding.h"
#include "engine.h"

namespace py = pybind11;
using namespace reap;

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
    m.doc() = "CUDA kernels of reap_kernels; see csrc/cuda.";
    m.attr("architectures") = REAP_CUDA_ARCHS;
    bind_layer(m);
    m.def("device_count", &cuda::device_count);
    m.def(
        "workspace_bytes", [](std::string_view layer) { return cuda::workspace_bytes(read_layer(layer)); },
        py::arg("layer"));
    m.def(
        "run_layer",
        [](std::string_view numbers, uintptr_t workspace, uintptr_t stream) {
            const Layer layer = read_layer(numbers);
            py::gil_scoped_release release;
            cuda::run_layer(layer, reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(stream));
        },
        py::arg("layer"), py::arg("workspace"), py::arg("stream"));
}
