// What all kernels share: element types, 16-byte pieces of rows, and launches.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "launches.h"

#define HOST_DEVICE __host__ __device__ __forceinline__

namespace fused_align {

constexpr int64_t IGNORE_INDEX = -100;
constexpr int WARP = 32;
constexpr int THREADS = 256;  // of a block, where nothing else is said
constexpr int PIECE = 8;  // elements that a thread moves at once: 16 bytes of a 16-bit type, 32 of float32

using bfloat16 = __nv_bfloat16;
using float16 = __half;

inline int64_t divided(int64_t count, int64_t by) {
    return (count + by - 1) / by;
}

// ---- one element ---------------------------------------------------------------------------------------

template <typename W>
HOST_DEVICE W widened(float x) {
    return static_cast<W>(x);
}
template <typename W>
HOST_DEVICE W widened(double x) {
    return static_cast<W>(x);
}
template <typename W>
HOST_DEVICE W widened(bfloat16 x) {
    return static_cast<W>(__bfloat162float(x));
}
template <typename W>
HOST_DEVICE W widened(float16 x) {
    return static_cast<W>(__half2float(x));
}

/// x in another type, to the nearest.
template <typename T, typename W>
HOST_DEVICE T rounded(W x) {
    if constexpr (std::is_same_v<T, bfloat16>) {
        return __float2bfloat16_rn(static_cast<float>(x));
    } else if constexpr (std::is_same_v<T, float16>) {
        return __float2half_rn(static_cast<float>(x));
    } else {
        return static_cast<T>(x);
    }
}

/// x rounded to a type that is known at run time (Type::none: not at all), and back.
template <typename W>
HOST_DEVICE W rounded_to(Type type, W x) {
    if (type == Type::bfloat16) return widened<W>(rounded<bfloat16>(x));
    if (type == Type::float16) return widened<W>(rounded<float16>(x));
    if (type == Type::float32) return static_cast<W>(static_cast<float>(x));
    return x;
}

/// The same of several, behind one test.
template <int COUNT, typename W>
HOST_DEVICE void round_to(Type type, W (&x)[COUNT]) {
    if (type == Type::none) return;
#pragma unroll
    for (int k = 0; k < COUNT; ++k) x[k] = rounded_to(type, x[k]);
}

/// Element i of a vector of any float type.
template <typename W>
HOST_DEVICE W element(const Array& a, int64_t i) {
    switch (a.type) {
        case Type::float64:
            return widened<W>(static_cast<const double*>(a.data)[i]);
        case Type::float32:
            return widened<W>(static_cast<const float*>(a.data)[i]);
        case Type::bfloat16:
            return widened<W>(static_cast<const bfloat16*>(a.data)[i]);
        default:
            return widened<W>(static_cast<const float16*>(a.data)[i]);
    }
}

// ---- arrays -------------------------------------------------------------------------------------------

template <typename Element>
constexpr Type type_of() {
    using T = std::remove_const_t<Element>;
    if (std::is_same_v<T, double>) return Type::float64;
    if (std::is_same_v<T, float>) return Type::float32;
    if (std::is_same_v<T, bfloat16>) return Type::bfloat16;
    if (std::is_same_v<T, float16>) return Type::float16;
    if (std::is_same_v<T, int64_t>) return Type::int64;
    if (std::is_same_v<T, int>) return Type::int32;
    return Type::none;
}

/// The address of an array's first element, whose type is checked.
template <typename T>
T* as(const Array& a) {
    if (a.data && a.type != type_of<T>())
        throw std::invalid_argument(std::string("an argument of a kernel is to be ") + name_of(type_of<T>()) +
                                    "; got " + name_of(a.type) + ".");
    return static_cast<T*>(a.data);
}

// ---- pieces of rows ------------------------------------------------------------------------------------

/// The elements of 16 bytes.
template <typename T>
constexpr int EACH = 16 / sizeof(T);

/// 16 bytes as they came: loaded early, and widened where they are used.
template <typename T>
struct Vector {
    uint4 bits;

    Vector() = default;

    /// At a multiple of 16 bytes.
    HOST_DEVICE explicit Vector(const T* from) : bits(*reinterpret_cast<const uint4*>(from)) {}

    /// Elements low to high of them alone, at any address; 0 beside them.
    HOST_DEVICE Vector(const T* from, int low, int high) : bits{} {
#pragma unroll
        for (int k = 0; k < EACH<T>; ++k)
            if (k >= low && k < high) reinterpret_cast<T*>(&bits)[k] = from[k];
    }

    template <typename W>
    HOST_DEVICE void widen(W (&out)[EACH<T>]) const {
#pragma unroll
        for (int k = 0; k < EACH<T>; ++k) out[k] = widened<W>(reinterpret_cast<const T*>(&bits)[k]);
    }
};

/// COUNT neighbouring elements in as few stores as there can be. The address is a multiple of their size,
/// or 16.
template <int COUNT, typename T, typename W>
HOST_DEVICE void store_together(T* to, const W (&x)[COUNT]) {
    constexpr int BYTES = COUNT * sizeof(T);
    using Unit = std::conditional_t<BYTES % 16 == 0, uint4, std::conditional_t<BYTES == 8, uint2, unsigned>>;
    static_assert(BYTES % sizeof(Unit) == 0);
    Unit units[BYTES / sizeof(Unit)];
#pragma unroll
    for (int k = 0; k < COUNT; ++k) reinterpret_cast<T*>(units)[k] = rounded<T>(x[k]);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(units) / sizeof(Unit)); ++i)
        reinterpret_cast<Unit*>(to)[i] = units[i];
}

/// PIECE neighbouring elements in 16-byte loads. The address is a multiple of 16.
template <typename T, typename W>
HOST_DEVICE void load_piece(const T* from, W (&out)[PIECE]) {
    Vector<T> vectors[PIECE / EACH<T>];
#pragma unroll
    for (int i = 0; i < PIECE / EACH<T>; ++i) vectors[i] = Vector<T>(from + i * EACH<T>);
#pragma unroll
    for (int k = 0; k < PIECE; ++k)
        out[k] = widened<W>(reinterpret_cast<const T*>(&vectors[k / EACH<T>].bits)[k % EACH<T>]);
}

/// x, of which the compiler knows nothing. Else it keeps eight addresses in registers through a whole loop,
/// for the few pieces whose columns are not adjacent.
HOST_DEVICE int64_t unknown(int64_t x) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+l"(x));
#endif
    return x;
}

/// A matrix that is read and written in pieces of rows, columns adjacent or not.
template <typename T>
struct Matrix {
    T* data;
    int64_t stride, step;  // of rows and columns, in elements
    bool wide;             // every PIECE of a row begins at a multiple of 16 bytes

    Matrix(const Array& a, int64_t stride, int64_t step = 1)
        : data(as<T>(a)),
          stride(stride),
          step(step),
          wide(step == 1 && reinterpret_cast<uintptr_t>(a.data) % 16 == 0 && stride * sizeof(T) % 16 == 0) {}

    /// `count` elements (of PIECE) from a row's column, which is a multiple of PIECE; 0 behind them.
    template <typename W>
    HOST_DEVICE void load(int64_t row, int64_t column, int count, W (&out)[PIECE]) const {
        const T* from = data + row * stride + column * step;
        if (wide && count >= PIECE) {
            load_piece(from, out);
        } else {
            const int64_t apart = unknown(step);
#pragma unroll
            for (int k = 0; k < PIECE; ++k) out[k] = k < count ? widened<W>(from[k * apart]) : W(0);
        }
    }

    template <typename W>
    HOST_DEVICE void store(int64_t row, int64_t column, int count, const W (&x)[PIECE]) const {
        T* to = data + row * stride + column * step;
        if (wide && count >= PIECE) {
            store_together(to, x);
        } else {
            const int64_t apart = unknown(step);
#pragma unroll
            for (int k = 0; k < PIECE; ++k)
                if (k < count) to[k * apart] = rounded<T>(x[k]);
        }
    }
};

/// Kernels over rows of size H give each a warp, whose lanes take every 32nd piece of it.
__device__ __forceinline__ int64_t row_of_warp() {
    return static_cast<int64_t>(blockIdx.x) * (THREADS / WARP) + threadIdx.x / WARP;
}

inline int64_t blocks_of_rows(int64_t rows) {
    return divided(rows, THREADS / WARP);
}

/// body(column, count) for the pieces of a row of H elements that are this lane's.
template <typename Body>
__device__ __forceinline__ void for_pieces_of(int64_t hidden, Body body) {
    for (int64_t column = threadIdx.x % WARP * PIECE; column < hidden; column += WARP * PIECE)
        body(column, static_cast<int>(min(hidden - column, static_cast<int64_t>(PIECE))));
}

// ---- launches ------------------------------------------------------------------------------------------

template <typename T>
struct Tag {
    using type = T;
};

template <typename T>
using TypeOf = typename T::type;

/// body(Tag<T>) of a float type.
template <typename Body>
void with_float(const char* kernel, Type type, Body body) {
    if (type == Type::float32) return body(Tag<float>{});
    if (type == Type::bfloat16) return body(Tag<bfloat16>{});
    if (type == Type::float16) return body(Tag<float16>{});
    if (type == Type::float64) return body(Tag<double>{});
    throw std::invalid_argument(std::string(kernel) + ": its arguments are of float types; got " +
                                name_of(type) + ".");
}

/// The type of sums over elements of these types: double where one of them is, else float.
template <typename... T>
using Work = std::conditional_t<(std::is_same_v<T, double> || ...), double, float>;

/// body(Tag<float>) or body(Tag<double>), by the type of the sums.
template <typename Body>
void with_work(const char* kernel, Type type, Body body) {
    if (type == Type::float32) return body(Tag<float>{});
    if (type == Type::float64) return body(Tag<double>{});
    throw std::invalid_argument(std::string(kernel) + ": sums are float32 or float64; got " + name_of(type) +
                                ".");
}

inline void check(const char* kernel, cudaError_t status) {
    if (status != cudaSuccess)
        throw std::runtime_error("fused_align's CUDA kernel " + std::string(kernel) + ": " +
                                 cudaGetErrorString(status) + ".");
}

/// Launches a kernel on `blocks` blocks in one dimension; nothing where there are none.
template <typename... Expected, typename... Given>
void launch(const char* name, const Device& on, int64_t blocks, int threads, void (*kernel)(Expected...),
            Given&&... given) {
    if (blocks == 0) return;
    if (blocks > std::numeric_limits<int32_t>::max())
        throw std::invalid_argument(std::string(name) + ": a grid has at most 2^31 - 1 blocks; got " +
                                    std::to_string(blocks) + ". Give it fewer rows at once.");
    check(name, cudaSetDevice(on.index));
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = static_cast<cudaStream_t>(on.stream);
    check(name, cudaLaunchKernelEx(&config, kernel, std::forward<Given>(given)...));
}

}  // namespace fused_align
