// Runs grids of thread blocks on one thread of a CPU.
//
// The blocks of a grid run one after the other. The threads of a block take turns: each runs until it waits
// for others or ends, and then the next one that can go on is resumed. A thread that waits keeps its stack;
// one that ended leaves its stack to the next thread that starts, so a kernel that never waits runs on a
// single stack. The orders in which blocks and threads come are set by emulation_set_order: a kernel whose
// result depends on them has a race.
//
// What can't go on is an error and never a hang: a barrier that some threads of the block, or some lanes of
// its mask, never reach. It is stricter than a GPU in that threads which have ended count as missing, and in
// that threads that wait together must wait at the same line of the same file.
//
// Compiled without sanitizers' checks of its own, whose handlers are here: g++ -fsanitize=alignment and
// others call __ubsan_handle_*_abort, and the launch then fails with a sentence.

#include <cuda_runtime.h>

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <vector>

#if !defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
#define EMULATION_UCONTEXT
#endif
#ifdef EMULATION_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {
namespace {

constexpr int MOST_THREADS = 1024, WARP = 32;
constexpr size_t STACK = 64 << 10, GUARD = 4 << 10;

// ---- stacks and the switch between them -----------------------------------------------------------------

struct Fiber {
    void* low = nullptr;  // end of the stack
    size_t size = 0;
#ifdef EMULATION_UCONTEXT
    ucontext_t context;
#else
    void* top = nullptr;  // where its registers lie
#endif
};

#ifndef EMULATION_UCONTEXT
extern "C" void emulation_switch(void** from, void* to);

// Pushes what a call preserves, changes the stack, and pops. It jumps where `ret` would be mispredicted.
asm(R"(
.text
.local emulation_switch
.type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmpq *%rcx
.size emulation_switch, . - emulation_switch
)");
#endif

int64_t switches = 0;

void run_threads();

void switch_to(Fiber& from, Fiber& to) {
    ++switches;
#ifdef __SANITIZE_ADDRESS__
    void* fake;
    __sanitizer_start_switch_fiber(&fake, to.low, to.size);
#endif
#ifdef EMULATION_UCONTEXT
    swapcontext(&from.context, &to.context);
#else
    emulation_switch(&from.top, to.top);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void first_turn() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    run_threads();
    abort();  // it never returns
}

/// To be entered at first_turn.
void prepare(Fiber& fiber, int number) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(fiber.low, fiber.size);  // of frames that an error left behind
#endif
    // Stacks begin at different offsets in a page, or all would compete for the same lines of the cache.
    const size_t apart = static_cast<size_t>(number % 64) * 64;
#ifdef EMULATION_UCONTEXT
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.low;
    fiber.context.uc_stack.ss_size = fiber.size - apart;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, first_turn, 0);
#else
    void** top = reinterpret_cast<void**>(static_cast<char*>(fiber.low) + fiber.size - apart);
    *--top = nullptr;  // a call would have left the stack 8 bytes off a multiple of 16
    *--top = reinterpret_cast<void*>(&first_turn);
    for (int registers = 0; registers < 6; ++registers) *--top = nullptr;
    fiber.top = top;
#endif
}

Fiber* new_fiber(int number) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, STACK + GUARD, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, GUARD, PROT_NONE) != 0) {
        perror("emulation: no memory for the stack of a thread");
        abort();
    }
    Fiber* fiber = new Fiber;
    fiber->low = static_cast<char*>(memory) + GUARD;
    fiber->size = STACK;
    prepare(*fiber, number);
    return fiber;
}

// ---- the state of a grid --------------------------------------------------------------------------------

struct Waiting {  // what a thread waits for
    Wait wait;
    unsigned mask;
    int source;
    uint64_t bits;
    Place place;
};

std::mutex one_grid;
char sentence[1024] = "";
bool broken, inside;
int order = 0;  // see emulation_set_order
uint64_t random_state;

Run run;
void* call;
Fiber outside;               // who called the launch
std::vector<Fiber*> fibers;  // all there are
std::vector<Fiber*> idle;    // without a thread
int threads, current, ended, at_block;
uint16_t thread_order[MOST_THREADS];
uint3 index_of[MOST_THREADS];
Fiber* fiber_of[MOST_THREADS];  // null: not started yet
bool has_ended[MOST_THREADS];
Waiting waiting[MOST_THREADS];
unsigned waits_in_warp[MOST_THREADS / WARP];  // lanes

// Threads that can go on, as a ring.
uint16_t ready[MOST_THREADS];
unsigned ready_from, ready_to;

bool nobody_ready() { return ready_from == ready_to; }
int first_ready() { return ready[ready_from % MOST_THREADS]; }
void append(int thread) { ready[ready_to++ % MOST_THREADS] = static_cast<uint16_t>(thread); }
void prepend(int thread) { ready[--ready_from % MOST_THREADS] = static_cast<uint16_t>(thread); }

uint64_t random_number() {  // xorshift64
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
}

template <typename T>
void put_in_order(T* items, uint64_t count) {
    for (uint64_t i = 0; i < count; ++i) items[i] = static_cast<T>(order == 1 ? count - 1 - i : i);
    if (order < 2) return;
    for (uint64_t i = count; i > 1; --i) std::swap(items[i - 1], items[random_number() % i]);
}

/// All threads of the block can go on.
void all_ready() {
    if (order >= 2) put_in_order(thread_order, static_cast<uint64_t>(threads));
    memcpy(ready, thread_order, static_cast<size_t>(threads) * sizeof(ready[0]));
    ready_from = 0;
    ready_to = static_cast<unsigned>(threads);
}

/// Lanes of a warp can go on: at once, as a warp mostly does, or in a random order after all others.
void lanes_ready(int warp, unsigned mask) {
    int lanes[WARP];
    put_in_order(lanes, WARP);
    const bool later = order >= 2 && random_number() % 2 == 0;
    for (int i = 0; i < WARP; ++i) {
        const int lane = lanes[later ? i : WARP - 1 - i];
        if ((mask >> lane & 1) == 0) continue;
        if (later) append(warp * WARP + lane); else prepend(warp * WARP + lane);
    }
}

/// The thread whose turn it is.
void take_turn(int thread) {
    ++ready_from;
    current = thread;
    threadIdx = index_of[thread];
}

/// Back to the launch, for good.
void leave() {
    Fiber nowhere;
    switch_to(nowhere, outside);
    abort();
}

__attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(sentence, sizeof(sentence), format, arguments);
    va_end(arguments);
    broken = true;
    leave();
}

std::string name_of(const uint3& at) {
    return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

std::string name_of(int thread) {
    return "thread " + name_of(index_of[thread]) + " of block " + name_of(blockIdx);
}

const char* name_of(Wait wait) {
    constexpr const char* NAMES[] = {"nothing", "__syncthreads", "__syncwarp", "a shuffle", "a ballot"};
    return NAMES[static_cast<int>(wait)];
}

std::string name_of(const Place& place) {
    const char* slash = strrchr(place.file, '/');
    const char* file = slash != nullptr ? slash + 1 : place.file;
    return std::string(place.function) + ", " + file + ":" + std::to_string(place.line);
}

std::string name_of(const Waiting& w) {
    char mask[32] = "";
    if (w.wait != Wait::block) snprintf(mask, sizeof(mask), " of lanes 0x%08x", w.mask);
    return std::string(name_of(w.wait)) + mask + " in " + name_of(w.place);
}

bool alike(const Waiting& a, const Waiting& b) {
    const char *one = a.place.file, *other = b.place.file;
    if (a.wait != b.wait || a.mask != b.mask || a.place.line != b.place.line) return false;
    return one == other || strcmp(one, other) == 0;
}

// ---- turns ----------------------------------------------------------------------------------------------

/// What each stack does: starts threads that have none, one after the other, and steps aside for those that
/// have.
void run_threads() {
    Fiber* const own = idle.back();  // whoever comes here takes the last
    idle.pop_back();
    for (;;) {
        if (nobody_ready()) {
            idle.push_back(own);
            switch_to(*own, outside);
            idle.pop_back();
            continue;
        }
        const int thread = first_ready();
        take_turn(thread);
        if (fiber_of[thread] != nullptr) {
            idle.push_back(own);
            switch_to(*own, *fiber_of[thread]);
            idle.pop_back();
            continue;
        }
        fiber_of[thread] = own;
        run(call);
        has_ended[thread] = true;
        ++ended;
    }
}

Fiber& idle_fiber() {
    if (idle.empty()) {
        idle.push_back(new_fiber(static_cast<int>(fibers.size())));
        fibers.push_back(idle.back());
    }
    return *idle.back();
}

/// Runs others until this thread is ready and first in turn.
void give_way() {
    const int self = current;
    if (nobody_ready()) leave();  // run_block finds out what is missing
    const int next = first_ready();
    if (next != self && fiber_of[next] == nullptr) return switch_to(*fiber_of[self], idle_fiber());
    take_turn(next);
    if (next != self) switch_to(*fiber_of[self], *fiber_of[next]);
}

void must_be_inside(const char* what) {
    if (inside) return;
    fprintf(stderr, "emulation: %s outside of a kernel\n", what);
    abort();
}

/// A sentence on why nobody can go on.
void explain_standstill() {
    int first = 0, other = -1;
    while (has_ended[first]) ++first;
    for (int thread = 0; thread < threads; ++thread)
        if (!has_ended[thread] && !alike(waiting[thread], waiting[first])) other = thread;
    std::string text = name_of(first) + " waits forever at " + name_of(waiting[first]) + ": ";
    if (other >= 0) text += name_of(other) + " waits at " + name_of(waiting[other]) + ", and ";
    snprintf(sentence, sizeof(sentence), "%s%d of the block's %d threads have ended", text.c_str(), ended,
             threads);
    broken = true;
}

void run_block() {
    for (int thread = 0; thread < threads; ++thread) {
        fiber_of[thread] = nullptr;
        has_ended[thread] = false;
    }
    memset(waits_in_warp, 0, sizeof(waits_in_warp));
    ended = at_block = 0;
    all_ready();
    switch_to(outside, idle_fiber());
    if (!broken && ended != threads) explain_standstill();
}

// ---- shared memory --------------------------------------------------------------------------------------

extern "C" uint64_t emulated_shared_begin[], emulated_shared_end[];  // from shared.ld

constexpr ptrdiff_t PIECE = 128;  // words
std::vector<uint64_t*> in_use;  // pieces that the first block of the grid wrote to

// No memset and no memchr here: with -fsanitize=address what lies between arrays is out of bounds.
#define RAW __attribute__((no_sanitize_address, optimize("no-tree-loop-distribute-patterns")))

RAW void poison(uint64_t* from, uint64_t* to) {
    for (uint64_t* at = from; at < to; ++at) *at = ~uint64_t{0};
}

RAW bool is_poison(const uint64_t* from, const uint64_t* to) {
    uint64_t all = ~uint64_t{0};
    for (const uint64_t* at = from; at < to; ++at) all &= *at;
    return all == ~uint64_t{0};
}

uint64_t* end_of(uint64_t* piece) { return std::min<uint64_t*>(piece + PIECE, emulated_shared_end); }

/// Before a block, all shared memory becomes 0xff: NaN in every float type, -1 in every integer. There may be
/// hundreds of KB, most of other kernels, so that from the second block on only what the first one used does.
void poison_shared(uint64_t blocks_before) {
    if (blocks_before == 0) return poison(emulated_shared_begin, emulated_shared_end);
    if (blocks_before == 1) {
        in_use.clear();
        for (uint64_t* piece = emulated_shared_begin; piece < emulated_shared_end; piece += PIECE)
            if (!is_poison(piece, end_of(piece))) in_use.push_back(piece);
    }
    for (uint64_t* piece : in_use) poison(piece, end_of(piece));
}

/// Stacks as new: those of threads that never ended hold their frames.
void reset_fibers() {
    idle = fibers;
    for (size_t i = 0; i < fibers.size(); ++i) prepare(*fibers[i], static_cast<int>(i));
}

}  // namespace

// ---- what headers call ----------------------------------------------------------------------------------

bool run_grid(const dim3& grid, const dim3& block, Run grid_run, void* grid_call) {
    const std::lock_guard<std::mutex> lock(one_grid);
#ifdef __SANITIZE_ADDRESS__
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &outside.low, &outside.size);
    pthread_attr_destroy(&attributes);
#endif
    run = grid_run;
    call = grid_call;
    gridDim = grid;
    blockDim = block;
    threads = static_cast<int>(block.x * block.y * block.z);
    random_state = 0x9e3779b97f4a7c15u * static_cast<uint64_t>(order + 1);
    put_in_order(thread_order, static_cast<uint64_t>(threads));
    for (int i = 0; i < threads; ++i) {
        const unsigned t = static_cast<unsigned>(i);
        index_of[i] = {t % block.x, t / block.x % block.y, t / (block.x * block.y)};
    }
    std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
    put_in_order(blocks.data(), blocks.size());
    broken = false;
    inside = true;
    for (uint64_t i = 0; i < blocks.size() && !broken; ++i) {
        const uint64_t b = blocks[i];
        const uint64_t xy = uint64_t{grid.x} * grid.y;
        blockIdx.x = static_cast<unsigned>(b % grid.x);
        blockIdx.y = static_cast<unsigned>(b % xy / grid.x);
        blockIdx.z = static_cast<unsigned>(b / xy);
        poison_shared(i);
        run_block();
    }
    inside = false;
    if (broken) reset_fibers();
    return !broken;
}

void refuse(const char* why) { snprintf(sentence, sizeof(sentence), "%s", why); }

const char* error() { return sentence; }

int lane() { return current % WARP; }

void wait_for_block(Place place) {
    must_be_inside("__syncthreads");
    Waiting& own = waiting[current] = {Wait::block, 0, 0, 0, place};
    static int first;  // to come
    if (at_block == 0) first = current;
    if (!alike(own, waiting[first]))
        fail("%s waits at %s, %s at %s: one barrier at two places", name_of(current).c_str(),
             name_of(own).c_str(), name_of(first).c_str(), name_of(waiting[first]).c_str());
    if (++at_block == threads) {
        at_block = 0;
        all_ready();
    }
    give_way();
}

uint64_t wait_for_lanes(Wait wait, unsigned mask, uint64_t bits, int source, Place place) {
    must_be_inside(name_of(wait));
    Waiting& own = waiting[current] = {wait, mask, source, bits, place};
    const int warp = current / WARP, in_warp = std::min(WARP, threads - warp * WARP);
    const unsigned existing = in_warp == WARP ? ~0u : (1u << in_warp) - 1, wanted = mask & existing;
    if ((mask >> lane() & 1) == 0)
        fail("%s, lane %d of its warp, is at %s, which does not name it", name_of(current).c_str(), lane(),
             name_of(own).c_str());
    unsigned& waits = waits_in_warp[warp];
    waits |= 1u << lane();
    if ((waits & wanted) == wanted) {
        const Waiting* lanes = waiting + warp * WARP;
        unsigned ballot = 0;
        for (unsigned left = wanted; left != 0; left &= left - 1) {
            const int one = __builtin_ctz(left);
            if (!alike(own, lanes[one]))
                fail("%s waits at %s, %s at %s: lanes that name each other must be at the same place",
                     name_of(current).c_str(), name_of(own).c_str(), name_of(warp * WARP + one).c_str(),
                     name_of(lanes[one]).c_str());
            ballot |= static_cast<unsigned>(lanes[one].bits != 0) << one;
        }
        // Lanes that take no part, or do not exist, give 0xff: nothing can be said of what a GPU gives.
        uint64_t given[WARP];
        for (unsigned left = wanted; left != 0; left &= left - 1) {
            const int one = __builtin_ctz(left), from = lanes[one].source;
            given[one] = wait == Wait::ballot ? ballot : wanted >> from & 1 ? lanes[from].bits : ~uint64_t{0};
        }
        for (unsigned left = wanted; left != 0; left &= left - 1) {
            const int one = __builtin_ctz(left);
            waiting[warp * WARP + one].bits = given[one];
        }
        waits &= ~wanted;
        lanes_ready(warp, wanted);
    }
    give_way();
    return own.bits;
}

void stray(const void* address, const char* what, Place place) {
    if (!inside) {
        fprintf(stderr, "emulation: address %p, %s, in %s\n", address, what, name_of(place).c_str());
        abort();
    }
    fail("%s accesses address %p, %s, in %s", name_of(current).c_str(), address, what,
         name_of(place).c_str());
    abort();
}

}  // namespace emulation

// ---- the handlers of g++ -fsanitize=... -fno-sanitize-recover -------------------------------------------

namespace {

struct Check {  // what each handler's data begins with
    const char* file;
    uint32_t line, column;
};

[[noreturn]] void undefined(const Check* check, const char* what) {
    const char* slash = strrchr(check->file, '/');
    const char* name = slash != nullptr ? slash + 1 : check->file;
    if (!emulation::inside) {
        fprintf(stderr, "%s:%u: %s\n", check->file, check->line, what);
        abort();
    }
    emulation::fail("%s: %s in %s:%u", emulation::name_of(emulation::current).c_str(), what, name,
                    check->line);
    abort();
}

}  // namespace

extern "C" {

void __ubsan_handle_type_mismatch_v1_abort(const Check* check, const void* address) {
    char what[80];
    snprintf(what, sizeof(what), "address %p is not aligned", address);
    undefined(check, address == nullptr ? "access through a null pointer" : what);
}

void __ubsan_handle_out_of_bounds_abort(const Check* check, uintptr_t index) {
    char what[80];
    snprintf(what, sizeof(what), "index %lld is outside of the array", static_cast<long long>(index));
    undefined(check, what);
}

#define HANDLER(name, what) void __ubsan_handle_##name##_abort(const Check* check) { undefined(check, what); }
HANDLER(add_overflow, "a sum of integers overflows")
HANDLER(sub_overflow, "a difference of integers overflows")
HANDLER(mul_overflow, "a product of integers overflows")
HANDLER(negate_overflow, "a negated integer overflows")
HANDLER(divrem_overflow, "a quotient of integers overflows, or is by zero")
HANDLER(shift_out_of_bounds, "a shift by too many bits")
#undef HANDLER

// ---- for Python, through ctypes -------------------------------------------------------------------------

/// 0: blocks and threads by their numbers; 1: backwards; from 2 on: shuffled, differently for each number.
__attribute__((visibility("default"))) void emulation_set_order(int order) { emulation::order = order; }

/// From one stack to another since the library was loaded.
__attribute__((visibility("default"))) int64_t emulation_switches() { return emulation::switches; }

}  // extern "C"
