// CUDA C++ for g++: what a .cu file of rcnn/kernels uses, with each CUDA thread as a fiber of this process.
//
// The blocks of a grid run one after the other, the threads of a block in turns: a fiber runs until it meets a barrier
// or a collective of its warp. With a seed the order of blocks and of fibers is shuffled, and atomics give way to other
// fibers now and then, so that a result that depends on the order shows. The scheduler knows who waits where, hence a
// barrier that some thread never reaches is an error and not a hang. Shared memory starts as garbage in every block.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <type_traits>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define CUDA_ON_CPU 1
#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __constant__ static const
#define __shared__ static __attribute__((section("cuda_shared")))
// The runtime's own reads and writes are no part of what the race checker watches.
#define RUNTIME __attribute__((no_sanitize("thread"), no_sanitize("undefined")))

struct dim3 { unsigned x, y, z; };
#define VECTOR2(T, name) \
    struct alignas(2 * sizeof(T)) name { T x, y; }; \
    static inline name make_##name(T x, T y) { return {x, y}; }
#define VECTOR4(T, name) \
    struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) name { T x, y, z, w; }; \
    static inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTOR2(float, float2) VECTOR4(float, float4)
VECTOR2(int, int2) VECTOR4(int, int4)
VECTOR2(unsigned, uint2) VECTOR4(unsigned, uint4)
VECTOR2(long long, longlong2) VECTOR2(unsigned long long, ulonglong2)
VECTOR2(short, short2) VECTOR4(short, short4)
VECTOR2(unsigned short, ushort2) VECTOR4(unsigned short, ushort4)
VECTOR4(signed char, char4) VECTOR4(unsigned char, uchar4)

namespace emulator {

constexpr int WARP = 32, MAX_THREADS = 1024;
constexpr size_t STACK = 256 << 10;
enum State { READY, AT_BARRIER, AT_WARP, DONE };
enum Op { SYNC, SHUFFLE, BALLOT, ANY, ALL, ADD, MIN, MAX, AND, OR, XOR, BARRIER, BARRIER_COUNT, BARRIER_AND, BARRIER_OR };

struct Fiber {
    void* stack_pointer;
    char* stack;
    void* fake_stack;
    dim3 thread;
    int number;
    State state;
    int line;           // of the barrier or collective where it waits
    Op op;
    unsigned mask;
    int width;          // of the type in a collective, bytes; negative if signed
    int source;         // lane that a shuffle reads
    uint64_t value, result;
};

static Fiber fibers[MAX_THREADS];
static Fiber* now;
static void* scheduler_stack;
static dim3 grid, block, block_index;
static int threads;
static uint64_t random_state;
static bool shuffled;
static char error[512];
static void (*kernel_call)(void**);
static void** kernel_arguments;
static unsigned char* dynamic_memory;
static size_t dynamic_size;

RUNTIME static inline uint64_t next_random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
}

}  // namespace emulator

#include "races.h"

// Switching of stacks -------------------------------------------------------------------------------------------------

namespace emulator {

#if defined(__x86_64__)
// Saves the registers that a call preserves, stores the stack pointer in *save and continues from the other stack.
extern "C" void cuda_on_cpu_switch(void** save, void* to);
asm(".text\n"
    ".local cuda_on_cpu_switch\n"
    "cuda_on_cpu_switch:\n"
    "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
    "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");

RUNTIME static void* prepare(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + STACK) - 2;
    *top = reinterpret_cast<void*>(entry);  // a call would leave the stack 8 bytes off 16, and so does this return
    memset(top - 6, 0, 6 * sizeof(void*));
    return top - 6;
}
#else
#include <ucontext.h>
RUNTIME static void cuda_on_cpu_switch(void** save, void* to) {
    ucontext_t here;
    *save = &here;
    swapcontext(&here, static_cast<ucontext_t*>(to));
}

RUNTIME static void* prepare(char* stack, void (*entry)()) {
    ucontext_t* context = reinterpret_cast<ucontext_t*>(stack);  // the far end of the stack
    getcontext(context);
    context->uc_stack.ss_sp = stack + sizeof(ucontext_t);
    context->uc_stack.ss_size = STACK - sizeof(ucontext_t);
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}
#endif

#if defined(__SANITIZE_ADDRESS__)
static const void* scheduler_bottom;
static size_t scheduler_size;
static void* scheduler_fake;
#endif

RUNTIME static void to_scheduler() {
    Fiber* self = now;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(self->state == DONE ? nullptr : &self->fake_stack, scheduler_bottom, scheduler_size);
#endif
    cuda_on_cpu_switch(&self->stack_pointer, scheduler_stack);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
}

RUNTIME static void to_fiber(Fiber* fiber) {
    now = fiber;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake, fiber->stack, STACK);
#endif
    cuda_on_cpu_switch(&scheduler_stack, fiber->stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
}

RUNTIME static void fiber_entry() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
    kernel_call(kernel_arguments);
    now->state = DONE;
    to_scheduler();
    abort();
}

// Ends the launch from inside a fiber: the fiber is never continued.
RUNTIME static inline void fail() {
    for (;;) to_scheduler();
}

// Barriers and collectives --------------------------------------------------------------------------------------------

RUNTIME static const char* name_of(Op op) {
    static const char* const names[] = {"__syncwarp",      "__shfl_sync",         "__ballot_sync",
                                        "__any_sync",      "__all_sync",          "__reduce_add_sync",
                                        "__reduce_min_sync", "__reduce_max_sync", "__reduce_and_sync",
                                        "__reduce_or_sync", "__reduce_xor_sync",  "__syncthreads",
                                        "__syncthreads_count", "__syncthreads_and", "__syncthreads_or"};
    return names[op];
}

RUNTIME static int barrier(int line, Op op, int predicate) {
    now->state = AT_BARRIER;
    now->line = line;
    now->op = op;
    now->value = predicate != 0;
    to_scheduler();
    return static_cast<int>(now->result);
}

// All threads stand at a barrier: gives the result and lets them go. False if they stand at different ones.
RUNTIME static bool release_barrier() {
    int count = 0;
    for (int i = 0; i < threads; i++) {
        if (fibers[i].line != fibers[0].line || fibers[i].op != fibers[0].op) {
            snprintf(error, sizeof error, "a barrier in divergent code: thread 0 waits at %s of line %d, thread %d at %s "
                     "of line %d, in block (%u, %u, %u)", name_of(fibers[0].op), fibers[0].line, i,
                     name_of(fibers[i].op), fibers[i].line, block_index.x, block_index.y, block_index.z);
            return false;
        }
        count += static_cast<int>(fibers[i].value);
    }
    for (int i = 0; i < threads; i++) {
        const Op op = fibers[i].op;
        fibers[i].result = op == BARRIER_AND ? count == threads : op == BARRIER_OR ? count > 0 : count;
        fibers[i].state = READY;
    }
    races::block_barrier();
    return true;
}

RUNTIME static uint64_t combine(Op op, int width, uint64_t a, uint64_t b) {
    const int64_t left = width < 0 ? static_cast<int32_t>(a) : static_cast<int64_t>(a);
    const int64_t right = width < 0 ? static_cast<int32_t>(b) : static_cast<int64_t>(b);
    switch (op) {
        case ADD: return static_cast<uint32_t>(a + b);
        case MIN: return left < right ? a : b;
        case MAX: return left > right ? a : b;
        case AND: return a & b;
        case OR: return a | b;
        default: return a ^ b;
    }
}

// The last lane of a collective has come: computes what each lane gets.
RUNTIME static void complete(Fiber* warp, unsigned mask, Op op) {
    uint64_t all = 0;
    bool first = true;
    for (int lane = 0; lane < WARP; lane++) {
        if (!(mask >> lane & 1)) continue;
        const uint64_t value = warp[lane].value;
        if (op == BALLOT || op == ANY || op == ALL) all |= static_cast<uint64_t>(value != 0) << lane;
        else if (op != SHUFFLE && op != SYNC) all = first ? value : combine(op, warp[lane].width, all, value);
        first = false;
    }
    for (int lane = 0; lane < WARP; lane++) {
        if (!(mask >> lane & 1)) continue;
        Fiber& fiber = warp[lane];
        if (op == SHUFFLE) {
            if (!(mask >> fiber.source & 1)) {
                snprintf(error, sizeof error, "line %d: lane %d shuffles from lane %d, which is not in the mask %08x",
                         fiber.line, lane, fiber.source, mask);
            }
            fiber.result = warp[fiber.source].value;
        } else {
            fiber.result = op == ANY ? all != 0 : op == ALL ? all == mask : all;
        }
        fiber.state = READY;
    }
    if (op == SYNC) races::warp_barrier(static_cast<int>(warp - fibers), mask);
}

RUNTIME static uint64_t collective(int line, Op op, unsigned mask, uint64_t value, int source, int width) {
    Fiber* self = now;
    Fiber* warp = fibers + self->number / WARP * WARP;
    const int lane = self->number % WARP;
    if (!(mask >> lane & 1)) {
        snprintf(error, sizeof error, "line %d: lane %d calls %s with mask %08x, which does not name it", line, lane,
                 name_of(op), mask);
        fail();
    }
    self->state = AT_WARP;
    self->line = line;
    self->op = op;
    self->mask = mask;
    self->value = value;
    self->source = source;
    self->width = width;
    bool complete_now = true;
    for (int other = 0; other < WARP && complete_now; other++) {
        if (!(mask >> other & 1)) continue;
        const Fiber& fiber = warp[other];
        complete_now = self->number - lane + other < threads && fiber.state == AT_WARP && fiber.op == op &&
                       fiber.mask == mask && fiber.line == line;
    }
    if (complete_now) {
        complete(warp, mask, op);
        if (error[0]) fail();
    }
    if (!complete_now || shuffled) to_scheduler();
    return self->result;
}

template <class T>
RUNTIME static uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= 8, "a collective takes at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <class T>
RUNTIME static T from_bits(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof(T));
    return value;
}

template <class T>
RUNTIME static T shuffle(int line, unsigned mask, T value, int source) {
    return from_bits<T>(collective(line, SHUFFLE, mask, to_bits(value), source, sizeof(T)));
}

template <class T>
RUNTIME static T reduce(int line, Op op, unsigned mask, T value) {
    static_assert(sizeof(T) == 4 && std::is_integral<T>::value, "__reduce_*_sync takes int or unsigned");
    return from_bits<T>(collective(line, op, mask, to_bits(value), 0, std::is_signed<T>::value ? -4 : 4));
}

RUNTIME static int lane() { return now->number % WARP; }
RUNTIME static int shuffle_up(int delta, int width) {
    return lane() % width >= delta ? lane() - delta : lane();
}
RUNTIME static int shuffle_down(int delta, int width) {
    return lane() % width + delta < width ? lane() + delta : lane();
}
RUNTIME static int shuffle_index(int index, int width) { return (lane() & ~(width - 1)) | (index & (width - 1)); }
RUNTIME static int shuffle_xor(int bits, int width) {
    return (lane() ^ bits) / width <= lane() / width ? lane() ^ bits : lane();
}

// Before an atomic: with a seed, other fibers run first one time in four.
template <class T>
RUNTIME static void before_atomic(T* address) {
    if (shuffled && (next_random() & 3) == 0) to_scheduler();
    races::access(address, sizeof(T), races::ATOMIC);
}

RUNTIME static inline unsigned char* dynamic_shared() { return dynamic_memory; }

// A launch ------------------------------------------------------------------------------------------------------------

extern "C" char __start_cuda_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_cuda_shared[] __attribute__((weak, visibility("hidden")));

// Signalling NaN patterns and large indices: whoever reads shared memory that nobody wrote notices.
__attribute__((no_sanitize("address"), no_sanitize("thread"), no_sanitize("undefined"))) static void spoil_shared() {
    for (volatile char* p = __start_cuda_shared; p < __stop_cuda_shared; p++) *p = static_cast<char>(0xa5);
    for (size_t i = 0; i < dynamic_size; i++) dynamic_memory[i] = 0xa5;
}

RUNTIME static void shuffle_order(int* order, int n) {
    for (int i = n - 1; i > 0; i--) std::swap(order[i], order[next_random() % (i + 1)]);
}

RUNTIME static void run_block() {
    static int order[MAX_THREADS];
    spoil_shared();
    races::start_block();
    for (int i = 0; i < threads; i++) {
        Fiber& fiber = fibers[i];
        if (!fiber.stack) {
            fiber.stack = static_cast<char*>(mmap(nullptr, STACK, PROT_READ | PROT_WRITE,
                                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
            if (fiber.stack == MAP_FAILED) abort();
        }
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(fiber.stack, STACK);
#endif
        fiber.stack_pointer = prepare(fiber.stack, fiber_entry);
        fiber.number = order[i] = i;
        fiber.thread = {i % block.x, i / block.x % block.y, i / block.x / block.y};
        fiber.state = READY;
    }
    for (;;) {
        bool moved = false;
        int done = 0, waiting = 0;
        if (shuffled) shuffle_order(order, threads);
        for (int i = 0; i < threads && !error[0]; i++) {
            if (fibers[order[i]].state == READY) {
                to_fiber(&fibers[order[i]]);
                moved = true;
            }
        }
        if (error[0]) return;
        for (int i = 0; i < threads; i++) {
            done += fibers[i].state == DONE;
            waiting += fibers[i].state == AT_BARRIER;
        }
        if (done == threads) return;
        if (waiting == threads) {
            if (!release_barrier()) return;
        } else if (!moved) {
            int i = 0;
            while (fibers[i].state == DONE) i++;
            snprintf(error, sizeof error, "a barrier that not all threads reach: thread %d waits at %s of line %d; of %d "
                     "threads in block (%u, %u, %u), %d wait at a block's barrier, %d at a collective of their warp and "
                     "%d have ended", i, name_of(fibers[i].op), fibers[i].line, threads, block_index.x, block_index.y,
                     block_index.z, waiting, threads - waiting - done, done);
            return;
        }
    }
}

RUNTIME static const char* run(void (*call)(void**), void** arguments, const unsigned* sizes, size_t shared,
                               uint64_t seed) {
    grid = {sizes[0], sizes[1], sizes[2]};
    block = {sizes[3], sizes[4], sizes[5]};
    threads = static_cast<int>(block.x * block.y * block.z);
    kernel_call = call;
    kernel_arguments = arguments;
    error[0] = 0;
    shuffled = seed != 0;
    random_state = seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du;
    dynamic_size = shared;
    // Its own allocation of just this size, so that the address sanitizer sees one byte too many.
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, shared ? shared : 16)) abort();
    dynamic_memory = static_cast<unsigned char*>(memory);
    races::start_launch();
    const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
    // A stride without a common divisor visits each block once in an order that the seed decides.
    uint64_t stride = shuffled && blocks > 1 ? 1 + next_random() % (blocks - 1) : 1, start = 0;
    for (;; stride++) {
        uint64_t a = blocks, b = stride;
        while (b) std::swap(a %= b, b);
        if (a == 1) break;
    }
    if (shuffled) start = next_random() % blocks;
    for (uint64_t i = 0; i < blocks && !error[0]; i++) {
        const uint64_t number = (start + i * stride) % blocks;
        block_index = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                       static_cast<unsigned>(number / grid.x / grid.y)};
        run_block();
    }
    now = nullptr;
    free(memory);
    return error;
}

// Signatures ----------------------------------------------------------------------------------------------------------

// One word per parameter: kind and size, `i4 u8 f4 o2` (o for a struct of bits), with `*` in front of it for a pointer.
template <class T>
struct Word {
    static void write(char*& out) {
        out += sprintf(out, "%c%d ", std::is_floating_point<T>::value ? 'f' : !std::is_integral<T>::value ? 'o'
                       : std::is_signed<T>::value ? 'i' : 'u', static_cast<int>(sizeof(T)));
    }
};
template <class T>
struct Word<T*> {
    static void write(char*& out) {
        *out++ = '*';
        Word<std::remove_cv_t<T>>::write(out);
    }
};

template <class... P>
static const char* signature_of(void (*)(P...)) {
    static char text[1024];
    char* out = text;
    (Word<std::remove_cv_t<P>>::write(out), ...);
    *out = 0;
    return text;
}

template <class... P, size_t... I>
RUNTIME static void call_with(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cv_t<P>*>(arguments[I])...);
}

template <class... P>
RUNTIME static void call_with(void (*kernel)(P...), void** arguments) {
    call_with(kernel, arguments, std::index_sequence_for<P...>{});
}

}  // namespace emulator

#define KERNEL_ENTRY(name)                                                                                         \
    extern "C" const char* signature_##name() { return emulator::signature_of(name); }                             \
    extern "C" const char* run_##name(void** arguments, const unsigned* sizes, size_t shared, uint64_t seed) {     \
        return emulator::run([](void** a) { emulator::call_with(name, a); }, arguments, sizes, shared, seed);      \
    }

// The names of CUDA ---------------------------------------------------------------------------------------------------

#define threadIdx (emulator::now->thread)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block)
#define gridDim (emulator::grid)
#define warpSize 32

#define __syncthreads() ((void)emulator::barrier(__LINE__, emulator::BARRIER, 0))
#define __syncthreads_count(p) emulator::barrier(__LINE__, emulator::BARRIER_COUNT, p)
#define __syncthreads_and(p) emulator::barrier(__LINE__, emulator::BARRIER_AND, p)
#define __syncthreads_or(p) emulator::barrier(__LINE__, emulator::BARRIER_OR, p)

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    emulator::collective(line, emulator::SYNC, mask, 0, 0, 0);
}
// A macro with an optional argument: the width of a shuffle.
#define CUDA_PICK(_1, _2, _3, _4, name, ...) name
#define CUDA_SHUFFLE(how, mask, value, argument, width) \
    emulator::shuffle(__LINE__, mask, value, emulator::how(argument, width))
#define CUDA_WIDTH3(how, mask, value, argument) CUDA_SHUFFLE(how, mask, value, argument, 32)
#define CUDA_WIDTH4(how, mask, value, argument, width) CUDA_SHUFFLE(how, mask, value, argument, width)
#define CUDA_SHUFFLES(how, ...) CUDA_PICK(__VA_ARGS__, CUDA_WIDTH4, CUDA_WIDTH3, , )(how, __VA_ARGS__)
#define __shfl_sync(...) CUDA_SHUFFLES(shuffle_index, __VA_ARGS__)
#define __shfl_up_sync(...) CUDA_SHUFFLES(shuffle_up, __VA_ARGS__)
#define __shfl_down_sync(...) CUDA_SHUFFLES(shuffle_down, __VA_ARGS__)
#define __shfl_xor_sync(...) CUDA_SHUFFLES(shuffle_xor, __VA_ARGS__)
#define CUDA_VOTE(op, mask, p) static_cast<unsigned>(emulator::collective(__LINE__, emulator::op, mask, (p) ? 1 : 0, 0, 0))
#define __ballot_sync(mask, p) CUDA_VOTE(BALLOT, mask, p)
#define __any_sync(mask, p) static_cast<int>(CUDA_VOTE(ANY, mask, p))
#define __all_sync(mask, p) static_cast<int>(CUDA_VOTE(ALL, mask, p))
#if __CUDA_ARCH__ >= 800
#define __reduce_add_sync(mask, v) emulator::reduce(__LINE__, emulator::ADD, mask, v)
#define __reduce_min_sync(mask, v) emulator::reduce(__LINE__, emulator::MIN, mask, v)
#define __reduce_max_sync(mask, v) emulator::reduce(__LINE__, emulator::MAX, mask, v)
#define __reduce_and_sync(mask, v) emulator::reduce(__LINE__, emulator::AND, mask, v)
#define __reduce_or_sync(mask, v) emulator::reduce(__LINE__, emulator::OR, mask, v)
#define __reduce_xor_sync(mask, v) emulator::reduce(__LINE__, emulator::XOR, mask, v)
#endif

#define CUDA_ATOMIC(name, expression)                                                       \
    template <class T>                                                                      \
    RUNTIME static inline T name(T* address, std::common_type_t<T> value) {                 \
        emulator::before_atomic(address);                                                   \
        const T old = *address;                                                             \
        *address = static_cast<T>(expression);                                              \
        return old;                                                                         \
    }
CUDA_ATOMIC(atomicAdd, std::is_signed<T>::value && std::is_integral<T>::value
                ? static_cast<T>(static_cast<uint64_t>(old) + static_cast<uint64_t>(value)) : old + value)
CUDA_ATOMIC(atomicSub, old - value)
CUDA_ATOMIC(atomicMax, old > value ? old : value)
CUDA_ATOMIC(atomicMin, old < value ? old : value)
CUDA_ATOMIC(atomicExch, value)
#define CUDA_ATOMIC_BITS(name, expression)                                                  \
    template <class T>                                                                      \
    RUNTIME static inline T name(T* address, std::common_type_t<T> value) {                 \
        static_assert(std::is_integral<T>::value, #name " takes integers");                 \
        emulator::before_atomic(address);                                                   \
        const T old = *address;                                                             \
        *address = expression;                                                              \
        return old;                                                                         \
    }
CUDA_ATOMIC_BITS(atomicOr, old | value)
CUDA_ATOMIC_BITS(atomicAnd, old & value)
CUDA_ATOMIC_BITS(atomicXor, old ^ value)
template <class T>
RUNTIME static inline T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
    emulator::before_atomic(address);
    const T old = *address;
    if (old == expected) *address = value;
    return old;
}

static inline void __threadfence() { emulator::races::fence(); }
static inline void __threadfence_block() {}
template <class T>
static inline T __ldg(const T* p) { return *p; }
static inline unsigned __float_as_uint(float x) { return emulator::from_bits<unsigned>(emulator::to_bits(x)); }
static inline int __float_as_int(float x) { return emulator::from_bits<int>(emulator::to_bits(x)); }
static inline float __uint_as_float(unsigned x) { return emulator::from_bits<float>(x); }
static inline float __int_as_float(int x) { return emulator::from_bits<float>(emulator::to_bits(x)); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
static inline int __float2int_ru(float x) { return static_cast<int>(ceilf(x)); }
static inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
static inline int __float2int_rz(float x) { return static_cast<int>(x); }
static inline float __int2float_rn(int x) { return static_cast<float>(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
static inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1u) << (31 - i);
    return y;
}
static inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
template <class A, class B>
static inline std::common_type_t<A, B> min(A a, B b) {
    static_assert(!std::is_floating_point<A>::value, "fminf says what becomes of NaN");
    return static_cast<std::common_type_t<A, B>>(a) < static_cast<std::common_type_t<A, B>>(b) ? a : b;
}
template <class A, class B>
static inline std::common_type_t<A, B> max(A a, B b) {
    static_assert(!std::is_floating_point<A>::value, "fmaxf says what becomes of NaN");
    return static_cast<std::common_type_t<A, B>>(a) > static_cast<std::common_type_t<A, B>>(b) ? a : b;
}
