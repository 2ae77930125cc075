// What can be told of the driver without a GPU.

#include "device.cuh"

namespace fused_align {

std::optional<std::string> unserved() {
    constexpr int MAJOR =
        1000;  // versions are 13000 for 13.0; a driver serves all runtimes of its major release
    int driver = 0, runtime = 0;
    check("unserved", cudaDriverGetVersion(&driver));
    check("unserved", cudaRuntimeGetVersion(&runtime));
    if (driver == 0 || driver / MAJOR >= runtime / MAJOR) return std::nullopt;
    const auto told = [](int version) {
        return std::to_string(version / MAJOR) + "." + std::to_string(version % MAJOR / 10);
    };
    return "its module was built with CUDA " + told(runtime) + ", and this driver serves CUDA " +
           told(driver) + " at most (update it, or install with an older nvcc)";
}

}  // namespace fused_align
