// csrc/cuda on the emulator, as a Python extension module with the functions of csrc/cuda/bindings.cpp.
// Tests compile it, see tests/emulated.py. Options and counters are those of the calling thread.
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "binding.h"
#include "simt/cache.h"
#include "simt/emulator.h"

namespace reap::cuda {
// In sources that test_cuda_mutants.py rewrote: which of its sites is out of order. 0: none.
inline thread_local int mutant = 0;
}  // namespace reap::cuda

#include "cuda/sm90/launch.cuh"

using namespace reap;

namespace {

struct Settings {
    simt::Options options;
    size_t cache_bytes = 0;  // of the modelled L2 cache; 0: none
    size_t together = 1;     // blocks that run at a time, for that model
};
thread_local Settings settings;
thread_local py::dict* counted = nullptr;

// Bytes from the first element to the last, of any strides.
size_t extent(const Weights& w, int64_t E, int64_t rows, int64_t k) {
    return 2 * ((E - 1) * w.expert_stride + (rows - 1) * w.row_stride + (k - 1) * w.k_stride + 1);
}
size_t bias_extent(const Weights& w, int64_t E, int64_t rows) {
    return 2 * ((E - 1) * w.bias_expert_stride + (rows - 1) * w.bias_row_stride + 1);
}

// What the call says is its memory, and nothing around it.
void add_buffers(simt::Emulator& emulator, const Layer& layer, char* workspace) {
    const int64_t slots = layer.T * layer.K, rows = layer.gated ? 2 * layer.I : layer.I;
    const auto input = [&](const char* name, const void* data, size_t bytes) {
        if (data) emulator.add_buffer(name, data, bytes, false);
    };
    input("hidden", layer.hidden, 2 * ((layer.T - 1) * layer.hidden_stride + layer.H));
    input("gate_up", layer.gate_up.data, extent(layer.gate_up, layer.E, rows, layer.H));
    input("gate_up_bias", layer.gate_up.bias, bias_extent(layer.gate_up, layer.E, rows));
    input("down", layer.down.data, extent(layer.down, layer.E, layer.H, layer.I));
    input("down_bias", layer.down.bias, bias_extent(layer.down, layer.E, layer.H));
    input("top_k_index", layer.top_k_index, slots * (layer.wide_ids ? sizeof(int64_t) : sizeof(int32_t)));
    input("top_k_weights", layer.top_k_weights, slots * (layer.gates == Dtype::f32 ? 4 : 2));
    input("sum_weights", layer.sum_weights, 2 * slots * sizeof(float));
    const auto output = [&](const char* name, void* data, size_t bytes) {
        emulator.add_buffer(name, data, bytes, true, false);
    };
    output("out", layer.out, 2 * layer.T * layer.H);
    output("norms", layer.norms, slots * sizeof(float));
    output("peaks", layer.peaks, slots * sizeof(float));
    if (layer.sum_weights) {
        output("channel_sums", layer.channel_sums, 2 * layer.E * layer.I * sizeof(float));
        output("output_sums", layer.output_sums, 2 * layer.E * layer.H * sizeof(float));
    }
    output("workspace", workspace, cuda::workspace_size(layer));
}

struct Launcher {
    simt::Emulator& emulator;
    simt::Cache* cache;
    std::vector<std::string> names;
    std::vector<uint64_t> fetched, written;  // bytes past the cache up to the end of each launch

    template <class Args>
    void operator()(const char* name, void (*kernel)(Args), int64_t blocks, int threads, int shared_bytes, Args args) {
        names.push_back(name);
        std::vector<std::vector<simt::Access>> seen(cache ? blocks : 0);
        if (cache)
            emulator.options.watch = [&](const simt::GlobalAccess& access) {
                seen[access.block.x].push_back({access.address, access.bytes, access.use != simt::Use::store,
                                                access.use == simt::Use::store || access.use == simt::Use::atomic});
            };
        emulator.launch(kernel, blocks, threads, shared_bytes, args);
        if (!cache) return;
        simt::replay(*cache, seen, settings.together);
        fetched.push_back(cache->fetched);
        written.push_back(cache->written);
    }
};

py::dict to_dict(const simt::Counters& counters, const Launcher& launcher) {
    py::dict all, global, shared;
    for (const auto& [name, traffic] : counters.global)
        global[name.c_str()] = py::dict(py::arg("read") = traffic.read, py::arg("written") = traffic.written,
                                        py::arg("atomics") = traffic.atomics);
    for (const auto& [line, use] : counters.shared)
        shared[line.c_str()] = py::dict(py::arg("what") = use.what, py::arg("requests") = use.requests,
                                        py::arg("wavefronts") = use.wavefronts, py::arg("conflicts") = use.conflicts);
    all["launches"] = launcher.names;
    all["mma"] = counters.mma;
    all["hinted"] = counters.hinted;
    all["met"] = counters.met;
    all["early"] = counters.early;
    all["global"] = global;
    all["shared"] = shared;
    all["fetched"] = launcher.fetched;
    all["written"] = launcher.written;
    return all;
}

py::dict run(const Layer& layer, char* workspace) {
    simt::Options options = settings.options;
    options.sm = layer.sm;
    options.overlapped = layer.sm >= 90;
    simt::Emulator emulator(options);
    add_buffers(emulator, layer, workspace);
    simt::Cache cache(settings.cache_bytes);
    Launcher launcher{emulator, settings.cache_bytes ? &cache : nullptr, {}, {}, {}};
    {
        py::gil_scoped_release release;
        if (layer.wgmma) cuda::sm90::run_layer(launcher, layer, workspace);
        else cuda::run_layer(launcher, layer, workspace);
        cache.write_back();
        if (launcher.cache) launcher.written.back() = cache.written;
    }
    return to_dict(emulator.counters, launcher);
}

}  // namespace

PYBIND11_MODULE(MODULE, m) {
    bind_layer(m);
    py::register_local_exception<simt::Fault>(m, "Fault", PyExc_RuntimeError);
    m.def(
        "configure",
        [](uint64_t seed, bool eager, bool profile, size_t shared_limit, uint64_t access_limit, size_t cache_bytes,
           size_t together, int mutant) {
            settings = Settings();
            settings.options.seed = seed;
            settings.options.eager = eager;
            settings.options.profile = profile;
            settings.options.shared_limit = shared_limit;
            settings.options.access_limit = access_limit;
            settings.cache_bytes = cache_bytes;
            settings.together = together;
            cuda::mutant = mutant;
        },
        py::kw_only(), py::arg("seed") = 0, py::arg("eager") = false, py::arg("profile") = false,
        py::arg("shared_limit") = 99 << 10, py::arg("access_limit") = 1 << 24, py::arg("cache_bytes") = 0,
        py::arg("together") = 1, py::arg("mutant") = 0);
    m.def(
        "workspace_bytes", [](std::string_view layer) { return cuda::workspace_size(read_layer(layer)); },
        py::arg("layer"));
    m.def(
        "run_layer",
        [](std::string_view layer, uintptr_t workspace, uintptr_t) {
            py::dict counters = run(read_layer(layer), reinterpret_cast<char*>(workspace));
            if (!counted) counted = new py::dict;
            *counted = counters;
        },
        py::arg("layer"), py::arg("workspace"), py::arg("stream"));
    m.def("counters", [] { return counted ? *counted : py::dict(); });
}
