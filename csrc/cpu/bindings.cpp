// The extension module reap_kernels._native: the CPU kernels.
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "../binding.h"
#include "engine.h"

namespace py = pybind11;
using namespace reap;

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
    m.doc() = "CPU kernels of reap_kernels; see csrc/cpu.";
    bind_layer(m);
    m.def("available_isas", [] {
        std::vector<std::string> names;
        for (const char* const* name = available_isas(); *name; ++name) names.emplace_back(*name);
        return names;
    });
    m.def(
        "run_layer",
        [](std::string_view numbers, const std::optional<std::string>& isa) {
            const Layer layer = read_layer(numbers);
            py::gil_scoped_release release;
            return run_layer(layer, isa ? isa->c_str() : nullptr);
        },
        py::arg("layer"), py::arg("isa") = py::none());
}
