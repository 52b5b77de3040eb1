// driver.cpp -- NVIDIA's driver API as far as this project calls it, with the emulator as its GPU:
// a libcuda.so under which src/device/cuda.rs runs, with its streams, events and page-locked
// memory, on a machine without a GPU (tests/cuda.rs).
//
// Work is queued on its stream. CROSSFUSION_DRIVER=lazy (default): done as late as the program's
// waits allow, so that memory written to before a copy out of it has ended shows. =eager: copies to
// the device are done as early as their stream's waits allow, so that memory filled before kernels
// are done with it shows. Device memory is not zero when new.
//
// A graph's kernels run in the last order that its edges allow, so that a missing edge shows.
//
// To meet bad situations: CROSSFUSION_DRIVER_DEVICES (0: no GPU), _CAPABILITY (75: too old),
// _MEMORY (bytes), _FAIL (the n-th kernel fails). _COUNTS: a file to write at the end, how many
// kernels were launched by themselves, graphs, kernels in graphs, and graphs that were made.
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "runtime.hpp"

namespace {
enum Result { Success = 0, InvalidValue = 1, OutOfMemory = 2, NotFound = 500, LaunchFailed = 719 };

struct Stream {
  std::deque<std::function<void()>> queue;
  uint64_t queued = 0, done = 0;
};
// A moment of a stream.
struct Event { std::shared_ptr<Stream> stream; uint64_t position = 0; };
struct Function { std::string name; std::vector<size_t> sizes; uint32_t most_shared = 48 << 10; };
// What a kernel is launched with.
struct Kernel { const Function* function; uint32_t grid[3], block[3], shared; std::vector<std::vector<char>> args; };
struct Node { size_t index; };
// A node comes after those of its edges, which are made before it.
struct Graph { std::deque<Node> nodes; std::vector<Kernel> kernels; std::vector<std::vector<size_t>> after; };

std::recursive_mutex mutex;  // of all below
std::map<uintptr_t, size_t> device_memory, page_locked;
// null: the default stream
std::map<void*, std::shared_ptr<Stream>> streams{{nullptr, std::make_shared<Stream>()}};
std::deque<Function> functions;  // as long as the process: modules are not unloaded
size_t allocated = 0, launched = 0;
struct Counts {
  size_t alone = 0, graphs = 0, inside = 0, made = 0;
  ~Counts() {
    const char* path = std::getenv("CROSSFUSION_DRIVER_COUNTS");
    std::FILE* file = path ? std::fopen(path, "w") : nullptr;
    if (!file) return;
    std::fprintf(file, "%zu %zu %zu %zu\n", alone, graphs, inside, made);
    std::fclose(file);
  }
} counts;
int failed = Success;        // a kernel's error stays
thread_local void* current = nullptr;

size_t setting(const char* name, size_t otherwise) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 10) : otherwise;
}
bool eager() {
  const char* text = std::getenv("CROSSFUSION_DRIVER");
  return text && !std::strcmp(text, "eager");
}
size_t total_memory() { return setting("CROSSFUSION_DRIVER_MEMORY", size_t(16) << 30); }

void run(Stream& stream, uint64_t until) {
  while (stream.done < until) {
    auto work = std::move(stream.queue.front());
    stream.queue.pop_front();
    work();
    stream.done++;
  }
}
int enqueue(void* stream, std::function<void()> work) {
  Stream& s = *streams.at(stream);
  s.queue.push_back(std::move(work));
  s.queued++;
  return failed;
}
// CUDA_KERNEL_NODE_PARAMS_v2 of <cuda.h>, without what we leave empty at its end.
struct KernelNodeParams { void* function; unsigned grid[3], block[3], shared; void** parameters; };

bool make(Kernel& kernel, const KernelNodeParams& p) {
  const Function& f = *static_cast<Function*>(p.function);
  if (!p.grid[0] || !p.grid[1] || !p.grid[2] || p.grid[1] > 65535 || p.grid[2] > 65535 || p.shared > f.most_shared) return false;
  kernel.function = &f;
  std::memcpy(kernel.grid, p.grid, sizeof p.grid);
  std::memcpy(kernel.block, p.block, sizeof p.block);
  kernel.shared = p.shared;
  for (size_t i = 0; i < f.sizes.size(); i++) {
    const char* argument = static_cast<const char*>(p.parameters[i]);
    kernel.args.emplace_back(argument, argument + f.sizes[i]);
  }
  return true;
}
int launch(void* stream, Kernel kernel) {
  const bool fails = ++launched == setting("CROSSFUSION_DRIVER_FAIL", 0);
  return enqueue(stream, [fails, k = std::move(kernel)] {
    if (failed) return;
    std::vector<const void*> pointers;
    for (const auto& arg : k.args) pointers.push_back(arg.data());
    const Function& f = *k.function;
    const SimtLaunch launch{f.name.c_str(), pointers.data(), f.sizes.data(), f.sizes.size(), 1,
                            {k.grid[0], k.grid[1], k.grid[2]}, {k.block[0], k.block[1], k.block[2]}, k.shared, 2};
    SimtStats stats;
    char error[2048];
    if (fails || simt_launch(&launch, &stats, error, sizeof error)) {
      if (!fails) std::fprintf(stderr, "emulated driver: %s\n", error);
      failed = LaunchFailed;
    }
  });
}
bool within(const std::map<uintptr_t, size_t>& memory, const void* p, size_t bytes) {
  auto it = memory.upper_bound(uintptr_t(p));
  return it != memory.begin() && uintptr_t(p) + bytes <= std::prev(it)->first + std::prev(it)->second;
}
}  // namespace

using Guard = std::lock_guard<std::recursive_mutex>;
#pragma GCC visibility push(default)
extern "C" {
// ---- device and context -------------------------------------------------------------------------
int cuInit(unsigned) { return Success; }
int cuDeviceGetCount(int* count) { return *count = int(setting("CROSSFUSION_DRIVER_DEVICES", 1)), Success; }
int cuDeviceGet(int* device, int ordinal) {
  if (ordinal < 0 || ordinal >= int(setting("CROSSFUSION_DRIVER_DEVICES", 1))) return InvalidValue;
  return *device = ordinal, Success;
}
int cuDeviceGetName(char* name, int bytes, int) { return std::snprintf(name, size_t(bytes), "emulated GPU"), Success; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  const int capability = int(setting("CROSSFUSION_DRIVER_CAPABILITY", 90));
  switch (attribute) {
    case 75: *value = capability / 10; break;
    case 76: *value = capability % 10; break;
    case 97: *value = 227 << 10; break;  // shared memory of a block, asked for
    case 115: *value = 1; break;         // memory pools
    default: return InvalidValue;
  }
  return Success;
}
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &mutex, Success; }
int cuDevicePrimaryCtxRelease_v2(int) { return Success; }
int cuCtxGetCurrent(void** context) { return *context = current, Success; }
int cuCtxSetCurrent(void* context) { return current = context, Success; }
int cuGetErrorName(int error, const char** name) {
  *name = error == OutOfMemory ? "CUDA_ERROR_OUT_OF_MEMORY" : error == LaunchFailed ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR";
  return Success;
}
int cuGetErrorString(int error, const char** text) { return *text = error == LaunchFailed ? "unspecified launch failure" : "error", Success; }

// ---- memory -------------------------------------------------------------------------------------
int cuMemGetInfo_v2(size_t* free, size_t* total) {
  Guard guard(mutex);
  *total = total_memory();
  *free = *total - allocated;
  return Success;
}
int cuMemAllocAsync(uint64_t* address, size_t bytes, void*) {
  Guard guard(mutex);
  if (bytes > total_memory() - allocated) return OutOfMemory;
  void* p = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
  std::memset(p, 0xff, bytes);
  *address = uint64_t(p);
  device_memory[uintptr_t(p)] = bytes;
  allocated += bytes;
  return failed;
}
int cuMemFreeAsync(uint64_t address, void* stream) {
  Guard guard(mutex);
  return enqueue(stream, [address] {
    allocated -= device_memory.at(address);
    device_memory.erase(address);
    std::free(reinterpret_cast<void*>(address));
  });
}
int cuMemHostAlloc(void** p, size_t bytes, unsigned) {
  Guard guard(mutex);
  *p = std::malloc(bytes);
  std::memset(*p, 0xff, bytes);
  page_locked[uintptr_t(*p)] = bytes;
  return failed;
}
int cuMemFreeHost(void* p) {
  Guard guard(mutex);
  page_locked.erase(uintptr_t(p));
  std::free(p);
  return failed;
}
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void* stream) {
  Guard guard(mutex);
  if (!within(device_memory, reinterpret_cast<void*>(to), bytes)) return InvalidValue;
  return enqueue(stream, [=] { std::memset(reinterpret_cast<void*>(to), value, bytes); });
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
  Guard guard(mutex);
  // what is not page-locked would be copied twice, and not beside the kernels
  if (!within(device_memory, reinterpret_cast<void*>(to), bytes) || !within(page_locked, from, bytes)) return InvalidValue;
  const int result = enqueue(stream, [=] { std::memcpy(reinterpret_cast<void*>(to), from, bytes); });
  if (eager()) run(*streams.at(stream), streams.at(stream)->queued);
  return result;
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
  Guard guard(mutex);
  if (!within(device_memory, reinterpret_cast<void*>(from), bytes)) return InvalidValue;
  return enqueue(stream, [=] { std::memcpy(to, reinterpret_cast<void*>(from), bytes); });
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  Guard guard(mutex);
  const auto inside = [&](uint64_t at) { return within(device_memory, reinterpret_cast<void*>(at), bytes); };
  if (!inside(to) || !inside(from)) return InvalidValue;
  return enqueue(stream, [=] { std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes); });
}

// ---- streams and events -------------------------------------------------------------------------
int cuStreamCreate(void** stream, unsigned) {
  Guard guard(mutex);
  auto made = std::make_shared<Stream>();
  *stream = made.get();
  streams[made.get()] = made;
  return failed;
}
int cuStreamSynchronize(void* stream) {
  Guard guard(mutex);
  run(*streams.at(stream), streams.at(stream)->queued);
  return failed;
}
int cuCtxSynchronize() {
  Guard guard(mutex);
  for (auto& [handle, stream] : streams) run(*stream, stream->queued);
  return failed;
}
int cuStreamDestroy_v2(void* stream) {
  cuStreamSynchronize(stream);
  Guard guard(mutex);
  streams.erase(stream);
  return failed;
}
int cuEventCreate(void** event, unsigned) { return *event = new Event, Success; }
int cuEventDestroy_v2(void* event) { return delete static_cast<Event*>(event), Success; }
int cuEventRecord(void* event, void* stream) {
  Guard guard(mutex);
  *static_cast<Event*>(event) = {streams.at(stream), streams.at(stream)->queued};
  return failed;
}
int cuStreamWaitEvent(void* stream, void* event, unsigned) {
  Guard guard(mutex);
  return enqueue(stream, [e = *static_cast<Event*>(event)] { if (e.stream) run(*e.stream, e.position); });
}
int cuEventSynchronize(void* event) {
  Guard guard(mutex);
  const Event& e = *static_cast<Event*>(event);
  if (e.stream) run(*e.stream, e.position);
  return failed;
}
int cuEventElapsedTime_v2(float* milliseconds, void*, void*) { return *milliseconds = 1.f, failed; }
int cuEventElapsedTime(float* milliseconds, void*, void*) { return *milliseconds = 1.f, failed; }

// ---- kernels ------------------------------------------------------------------------------------
int cuModuleLoadData(void** module, const void* image) {
  // <fatbinary_section.h>
  if (*static_cast<const uint32_t*>(image) != 0xba55ed50u) return InvalidValue;
  return *module = const_cast<void*>(image), Success;
}
int cuModuleUnload(void*) { return Success; }
int cuModuleGetFunction(void** function, void*, const char* name) {
  const size_t* sizes = nullptr;
  const int count = simt_parameters(name, &sizes);
  if (count < 0) return NotFound;
  const std::lock_guard lock(mutex);
  functions.push_back({name, std::vector<size_t>(sizes, sizes + count)});
  return *function = &functions.back(), Success;
}
// static shared memory
int cuFuncGetAttribute(int* value, int, void*) { return *value = 0, Success; }
int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute != 8) return InvalidValue;  // dynamic shared memory
  return static_cast<Function*>(function)->most_shared = uint32_t(value), Success;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void* stream, void** parameters, void**) {
  Guard guard(mutex);
  Kernel kernel;
  if (!make(kernel, {function, {gx, gy, gz}, {bx, by, bz}, shared, parameters})) return InvalidValue;
  counts.alone++;
  return launch(stream, std::move(kernel));
}

// ---- graphs -------------------------------------------------------------------------------------
int cuGraphCreate(void** graph, unsigned) { return *graph = new Graph, Success; }
int cuGraphDestroy(void* graph) { return delete static_cast<Graph*>(graph), Success; }
int cuGraphAddKernelNode_v2(void** node, void* graph, void* const* before, size_t count, const KernelNodeParams* parameters) {
  Guard guard(mutex);
  Graph& g = *static_cast<Graph*>(graph);
  Kernel kernel;
  if (!make(kernel, *parameters)) return InvalidValue;
  g.after.emplace_back();
  for (size_t i = 0; i < count; i++) g.after.back().push_back(static_cast<Node*>(before[i])->index);
  g.nodes.push_back({g.kernels.size()});
  g.kernels.push_back(std::move(kernel));
  return *node = &g.nodes.back(), Success;
}
int cuGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long) {
  Guard guard(mutex);
  counts.made++;
  auto made = new Graph;
  made->kernels = static_cast<Graph*>(graph)->kernels;
  made->after = static_cast<Graph*>(graph)->after;
  return *exec = made, Success;
}
int cuGraphExecDestroy(void* exec) { return delete static_cast<Graph*>(exec), Success; }
int cuGraphExecKernelNodeSetParams_v2(void* exec, void* node, const KernelNodeParams* parameters) {
  Guard guard(mutex);
  Kernel& old = static_cast<Graph*>(exec)->kernels.at(static_cast<Node*>(node)->index);
  Kernel kernel;
  if (!make(kernel, *parameters) || kernel.function != old.function) return InvalidValue;
  return old = std::move(kernel), Success;
}
int cuGraphLaunch(void* exec, void* stream) {
  Guard guard(mutex);
  const Graph& graph = *static_cast<Graph*>(exec);
  const size_t count = graph.kernels.size();
  std::vector<bool> started(count);
  counts.graphs++;
  counts.inside += count;
  for (size_t done = 0; done < count; done++) {
    size_t next = count;
    const auto ready = [&](size_t node) {
      for (size_t before : graph.after[node]) if (!started[before]) return false;
      return !started[node];
    };
    while (!ready(next - 1)) next--;  // edges lead forward: the first that is left is ready
    started[next - 1] = true;
    if (const int result = launch(stream, graph.kernels[next - 1])) return result;
  }
  return failed;
}
}
#pragma GCC visibility pop
