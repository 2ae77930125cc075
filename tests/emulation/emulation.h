// Thread blocks on a CPU: what cuda_runtime.h of this folder stands on. emulation.cpp says how they run.

#pragma once

#include <cstdint>

struct dim3;

namespace emulation {

enum class Wait : int { none, block, warp, shuffle, ballot };

/// Where in the sources a thread waits.
struct Place {
    const char* file;
    const char* function;
    int line;
};

/// A kernel with its arguments: run(call) executes it once, for the thread that threadIdx says.
using Run = void (*)(void* call);

/// Runs a grid. False: it could not go on, and error() says why.
bool run_grid(const dim3& grid, const dim3& block, Run run, void* call);

/// A launch that is refused, or anything else that went wrong: error() then says it.
void refuse(const char* sentence);
const char* error();

/// __syncthreads.
void wait_for_block(Place place);

/// Waits for the lanes of `mask`. A shuffle gives the bits of lane `source`, a ballot those lanes whose bits
/// are not 0.
uint64_t wait_for_lanes(Wait wait, unsigned mask, uint64_t bits, int source, Place place);

/// Lane of the thread that runs.
int lane();

/// An access that a GPU would refuse; comes back as the error of the launch.
[[noreturn]] void stray(const void* address, const char* what, Place place);

}  // namespace emulation
