// Storage types of feature maps and head outputs, and their conversion to float32, in which all arithmetic is done.
//
// A 16-bit value is its bits: no CUDA header is needed, and none is included (cuda_fp16.h is not part of a pip
// installation). The launcher names the type of a compilation by -DSCALAR=float, bfloat16 or float16.
// This file holds the only inline PTX; each piece has a twin in C, which the tests run.

struct bfloat16 {
    unsigned short bits;
};

struct float16 {
    unsigned short bits;
};

#ifdef SCALAR
typedef SCALAR scalar;
#endif

// Dynamic shared memory as an array of the given type, 16-byte aligned. One per kernel.
#ifdef CUDA_ON_CPU
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulator::dynamic_shared())
#else
#define DYNAMIC_SHARED(type, name)                                         \
    extern __shared__ __align__(16) unsigned char dynamic_shared_memory[]; \
    type* name = reinterpret_cast<type*>(dynamic_shared_memory)
#endif

__device__ __forceinline__ float to_float(float x) {
    return x;
}

__device__ __forceinline__ float to_float(bfloat16 x) {
    return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}

__device__ __forceinline__ float to_float(float16 x) {
#ifdef CUDA_ON_CPU
    const unsigned sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31u, fraction = x.bits & 1023u;
    if (exponent == 31u) return __uint_as_float(sign | 0x7f800000u | (fraction << 13));
    if (exponent != 0u) return __uint_as_float(sign | ((exponent + 112u) << 23) | (fraction << 13));
    const float small = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2 ** -24
    return sign ? -small : small;
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#endif
}

template <class T>
__device__ __forceinline__ T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}

// Round to nearest, ties to even; NaN stays NaN.
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
    const unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<unsigned short>((bits >> 16) | 0x0040u)};
    return {static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
__device__ __forceinline__ float16 from_float<float16>(float x) {
#ifdef CUDA_ON_CPU
    const unsigned bits = __float_as_uint(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    unsigned half;
    if (magnitude > 0x7f800000u) {
        half = 0x7fffu;
    } else if (magnitude >= 0x477ff000u) {  // rounds to 2 ** 16, which float16 does not have
        half = 0x7c00u;
    } else if (magnitude >= 0x38800000u) {  // 2 ** -14, the smallest normal number
        half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    } else {  // a multiple of 2 ** -24: adding 0.5 puts its rounded value into the last bits of the sum
        half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
    }
    return {static_cast<unsigned short>(sign | half)};
#else
    float16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#endif
}

// Number of values in 16 bytes.
template <class T>
struct Pack {
    static constexpr int size = 16 / sizeof(T);
};

__device__ __forceinline__ void unpack(unsigned word, float* out, bfloat16) {
    out[0] = to_float(bfloat16{static_cast<unsigned short>(word)});
    out[1] = to_float(bfloat16{static_cast<unsigned short>(word >> 16)});
}

__device__ __forceinline__ void unpack(unsigned word, float* out, float16) {
    out[0] = to_float(float16{static_cast<unsigned short>(word)});
    out[1] = to_float(float16{static_cast<unsigned short>(word >> 16)});
}

__device__ __forceinline__ void unpack(unsigned word, float* out, float) {
    out[0] = __uint_as_float(word);
}

// 16 bytes from a 16-byte boundary, as floats: one load.
template <class T>
__device__ __forceinline__ void load16(const T* p, float (&out)[Pack<T>::size]) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    constexpr int each = Pack<T>::size / 4;
    unpack(raw.x, out, T{});
    unpack(raw.y, out + each, T{});
    unpack(raw.z, out + 2 * each, T{});
    unpack(raw.w, out + 3 * each, T{});
}

__device__ __forceinline__ unsigned pack(const float* in, bfloat16) {
    return from_float<bfloat16>(in[0]).bits | static_cast<unsigned>(from_float<bfloat16>(in[1]).bits) << 16;
}

__device__ __forceinline__ unsigned pack(const float* in, float16) {
    return from_float<float16>(in[0]).bits | static_cast<unsigned>(from_float<float16>(in[1]).bits) << 16;
}

__device__ __forceinline__ unsigned pack(const float* in, float) {
    return __float_as_uint(in[0]);
}

// Floats to 16 bytes on a 16-byte boundary: one store.
template <class T>
__device__ __forceinline__ void store16(T* p, const float (&in)[Pack<T>::size]) {
    constexpr int each = Pack<T>::size / 4;
    *reinterpret_cast<uint4*>(p) =
        make_uint4(pack(in, T{}), pack(in + each, T{}), pack(in + 2 * each, T{}), pack(in + 3 * each, T{}));
}
