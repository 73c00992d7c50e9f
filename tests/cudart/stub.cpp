// A CUDA runtime without a GPU, linked to the objects of csrc/cuda in the place of the real one: it
// records what is launched and which tensor maps are made, and fails when it is told to. Beside the
// extension's own module the library has the module `recorder`, through which a test talks to it.
//
// Kernels never run. What the real runtime keeps per thread (current device, last error, pushed
// configurations) is kept per thread; as there, a call that fails leaves the last error behind, and
// only cudaGetLastError takes it away.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

struct Launch {
    std::string kernel;
    std::vector<unsigned> grid, block;
    size_t shared, allowed;  // dynamic shared memory asked for; and what the kernel's attribute lets it have
    uintptr_t stream;
    int device;
    bool overlapped;        // with the end of the launch before
    std::string arguments;  // the bytes of the kernel's only parameter
};

struct Map {
    int type, interleave, swizzle, promotion, fill;
    uintptr_t address;
    std::vector<uint64_t> sizes, strides;  // fastest first; strides in bytes, without the first
    std::vector<unsigned> box, steps;
};

struct Settings {
    std::string fails;                        // a function of the runtime, or "launch"
    int at = 1;                               // which of its calls
    int error = 0;                            // cudaError_t, or CUresult of cuTensorMapEncodeTiled
    bool encodes = true;                      // whether the driver has cuTensorMapEncodeTiled
    bool records = true;                      // false: every call succeeds at once, to measure what is around it
    std::map<std::string, size_t> arguments;  // kernel, without template arguments -> bytes of its parameter
};

struct Runtime {
    std::mutex mutex;
    Settings settings;
    std::map<std::string, int> calls;
    std::vector<Launch> launches;
    std::vector<Map> maps;           // since the process began, for the extension keeps some
    std::vector<std::string> order;  // of all calls
    std::map<const void*, size_t> allowed;
    std::map<const void*, std::string> kernels;
};

// Kernels register before any constructor of this file may have run.
Runtime& runtime() {
    static Runtime all;
    return all;
}

constexpr size_t WITHOUT_ASKING = 48 << 10;
thread_local int device = 0;
thread_local cudaError_t last = cudaSuccess;

struct Configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};
thread_local std::vector<Configuration> pushed;

// Whether this call of the function is the one that fails.
int failure(const std::string& function) {
    Runtime& all = runtime();
    all.order.push_back(function);
    const bool now = ++all.calls[function] == all.settings.at && function == all.settings.fails;
    return now ? all.settings.error : 0;
}

cudaError_t call(const char* function) {
    if (!runtime().settings.records) return cudaSuccess;
    const std::lock_guard<std::mutex> guard(runtime().mutex);
    const auto error = static_cast<cudaError_t>(failure(function));
    if (error != cudaSuccess) last = error;
    return error;
}

std::string demangled(const char* name) {
    int status = 0;
    const std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(name, nullptr, nullptr, &status), std::free);
    return status == 0 ? text.get() : name;
}

// "void reap::cuda::down_kernel<...>(...)" -> "reap::cuda::down_kernel"
std::string plain_name(std::string name) {
    name = name.substr(0, name.find_first_of("<("));
    return name.substr(name.rfind(' ') + 1);
}

CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                CUtensorMapFloatOOBfill fill) {
    Runtime& all = runtime();
    const std::lock_guard<std::mutex> guard(all.mutex);
    if (all.settings.records)
        if (const int error = failure("cuTensorMapEncodeTiled")) return static_cast<CUresult>(error);
    *map = CUtensorMap{};
    map->opaque[0] = all.maps.size();  // by which a test knows it among a launch's arguments
    all.maps.push_back({type,
                        interleave,
                        swizzle,
                        promotion,
                        fill,
                        reinterpret_cast<uintptr_t>(address),
                        {sizes, sizes + rank},
                        {strides, strides + rank - 1},
                        {box, box + rank},
                        {steps, steps + rank}});
    return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

// What nvcc's own code calls.
void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    runtime().kernels[host] = demangled(name);
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    pushed.push_back({grid, block, shared, stream});
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = pushed.back().grid, *block = pushed.back().block, *shared = pushed.back().shared;
    *static_cast<cudaStream_t*>(stream) = pushed.back().stream;
    pushed.pop_back();
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
    *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
    return cudaSuccess;
}
// The host's stubs refer to it; nobody calls them.
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { std::abort(); }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* host, void** arguments) {
    if (const cudaError_t error = call("launch")) return error;
    Runtime& all = runtime();
    if (!all.settings.records) return cudaSuccess;
    const std::lock_guard<std::mutex> guard(all.mutex);
    const std::string& name = all.kernels.at(host);
    const auto bytes = all.settings.arguments.find(plain_name(name));
    std::string copied;
    if (bytes != all.settings.arguments.end()) copied.assign(static_cast<const char*>(arguments[0]), bytes->second);
    const auto allowed = all.allowed.find(host);
    bool overlapped = false;
    for (unsigned i = 0; i < how->numAttrs; ++i)
        overlapped |= how->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                      how->attrs[i].val.programmaticStreamSerializationAllowed;
    all.launches.push_back({name,
                            {how->gridDim.x, how->gridDim.y, how->gridDim.z},
                            {how->blockDim.x, how->blockDim.y, how->blockDim.z},
                            how->dynamicSmemBytes,
                            allowed == all.allowed.end() ? WITHOUT_ASKING : allowed->second,
                            reinterpret_cast<uintptr_t>(how->stream),
                            device,
                            overlapped,
                            copied});
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
    if (const cudaError_t error = call("cudaFuncSetAttribute")) return error;
    if (!runtime().settings.records) return cudaSuccess;
    const std::lock_guard<std::mutex> guard(runtime().mutex);
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) runtime().allowed[host] = value;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return call("cudaGetDeviceCount");
}
cudaError_t cudaSetDevice(int wanted) {
    if (const cudaError_t error = call("cudaSetDevice")) return error;
    device = wanted;
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    if (const cudaError_t error = call("cudaGetDriverEntryPointByVersion")) return error;
    const std::lock_guard<std::mutex> guard(runtime().mutex);
    const bool there = runtime().settings.encodes;
    *function = there ? reinterpret_cast<void*>(&encode) : nullptr;
    *result = there ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
        case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
        case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
        case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
        case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
        case cudaErrorLaunchOutOfResources: return "cudaErrorLaunchOutOfResources";
        default: return "an error that the stub has no name for";
    }
}
const char* cudaGetErrorString(cudaError_t) { return "as the test wants it"; }
cudaError_t cudaGetLastError() {
    const cudaError_t error = last;
    last = cudaSuccess;
    return error;
}

}  // extern "C"

PYBIND11_MODULE(recorder, m) {
    py::class_<Launch>(m, "Launch", py::module_local())
        .def_readonly("kernel", &Launch::kernel)
        .def_readonly("grid", &Launch::grid)
        .def_readonly("block", &Launch::block)
        .def_readonly("shared", &Launch::shared)
        .def_readonly("allowed", &Launch::allowed)
        .def_readonly("stream", &Launch::stream)
        .def_readonly("device", &Launch::device)
        .def_readonly("overlapped", &Launch::overlapped)
        .def_property_readonly("arguments", [](const Launch& launch) { return py::bytes(launch.arguments); });
    py::class_<Map>(m, "Map", py::module_local())
        .def_readonly("type", &Map::type)
        .def_readonly("interleave", &Map::interleave)
        .def_readonly("swizzle", &Map::swizzle)
        .def_readonly("promotion", &Map::promotion)
        .def_readonly("fill", &Map::fill)
        .def_readonly("address", &Map::address)
        .def_readonly("sizes", &Map::sizes)
        .def_readonly("strides", &Map::strides)
        .def_readonly("box", &Map::box)
        .def_readonly("steps", &Map::steps);
    m.def(
        "reset",
        [](std::string fails, int at, int error, bool encodes, bool records, std::map<std::string, size_t> arguments) {
            Runtime& all = runtime();
            const std::lock_guard<std::mutex> guard(all.mutex);
            all.settings = {std::move(fails), at, error, encodes, records, std::move(arguments)};
            all.calls.clear(), all.launches.clear(), all.order.clear(), all.allowed.clear();
            device = 0, last = cudaSuccess;
        },
        "Forgets what was recorded but for maps, and says what fails from now on.", py::kw_only(),
        py::arg("fails") = "", py::arg("at") = 1, py::arg("error") = 0, py::arg("encodes") = true,
        py::arg("records") = true, py::arg("arguments") = std::map<std::string, size_t>());
    m.def("launches", [] { return runtime().launches; });
    m.def("map", [](size_t number) { return runtime().maps.at(number); });
    m.def("order", [] { return runtime().order; }, "Names of all functions that were called, in order.");
    m.def("last_error", [] { return static_cast<int>(last); }, "What cudaGetLastError would return.");
}
