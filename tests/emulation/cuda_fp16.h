// float16 for a CPU: the functions of CUDA's header that csrc/ uses, and no conversion that is not spelt out.
// In integers, because g++ has _Float16 in C++ only for some machines.

#pragma once

#include <cstdint>
#include <cstring>

struct __half {
    uint16_t bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
    const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, rest = x.bits & 0x7fffu;
    float out;
    if (rest >= 0x7c00) {  // inf, NaN
        const uint32_t wide = 0x7f800000u | rest << 13;
        memcpy(&out, &wide, 4);
    } else if (rest >= 0x400) {
        const uint32_t wide = (rest << 13) + (112u << 23);
        memcpy(&out, &wide, 4);
    } else {
        out = static_cast<float>(rest) * 0x1p-24f;
    }
    uint32_t wide;
    memcpy(&wide, &out, 4);
    wide |= sign;
    memcpy(&out, &wide, 4);
    return out;
}

/// To the nearest, ties to even. Every NaN becomes 0x7fff, as on a GPU.
inline __half __float2half_rn(float x) {
    uint32_t wide;
    memcpy(&wide, &x, 4);
    const uint32_t sign = wide >> 16 & 0x8000, size = wide & 0x7fffffffu;
    if (size > 0x7f800000u) return {0x7fff};
    if (size >= 0x47800000u) return {static_cast<uint16_t>(sign | 0x7c00)};  // from 65536 on
    if (size < 0x38800000u) {  // subnormal: the float's own addition rounds at 2^-24, the last place of 0.5
        float magnitude;
        memcpy(&magnitude, &size, 4);
        magnitude += 0.5f;
        uint32_t sum;
        memcpy(&sum, &magnitude, 4);
        return {static_cast<uint16_t>(sign | (sum - 0x3f000000u))};
    }
    // What rounds up past 65504 carries into the exponent, and is inf.
    return {static_cast<uint16_t>(sign | ((size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13))};
}

inline __half __float2half(float x) { return __float2half_rn(x); }
