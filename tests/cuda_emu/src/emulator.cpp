// The scheduler: runs the fibers of a block in a chosen order until all wait or have returned.
#include "emulator.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>
#include <vector>

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)

// Saves what a callee must preserve and the stack pointer, loads those of the other side.
extern "C" void emulator_switch(void** save, void* load);
asm(".text\n"
    ".globl emulator_switch\n"
    ".type emulator_switch,@function\n"
    "emulator_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\n"
    "movq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\n"
    "ret\n"
    ".size emulator_switch,.-emulator_switch\n");

struct Context {
    void* stack_pointer = nullptr;

    void prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
        const uintptr_t end = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t(15);
        void** top = reinterpret_cast<void**>(end);
        // No return address of the entry, the entry as that of the switch, six registers.
        *--top = nullptr;
        *--top = reinterpret_cast<void*>(entry);
        for (int i = 0; i < 6; i++) *--top = nullptr;
        stack_pointer = top;
    }
    void switch_to(Context& other) { emulator_switch(&stack_pointer, other.stack_pointer); }
};

#else

#include <ucontext.h>

struct Context {
    ucontext_t context;

    void prepare(unsigned char* stack, size_t bytes, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = bytes;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    void switch_to(Context& other) { swapcontext(&context, &other.context); }
};

#endif

namespace emulator {

namespace {

constexpr size_t STACK_BYTES = 64 * 1024;
constexpr unsigned WARP = 32;
constexpr unsigned MAX_THREADS = 1024;

enum class State { Ready, AtBlock, AtWarp, Done };

struct Fiber : Thread {
    Context context;
    State state;
    // Lanes that it waits for.
    unsigned mask;
    std::unique_ptr<unsigned char[]> stack;
};

struct Scheduler {
    std::vector<Fiber> fibers;
    std::vector<unsigned> order;
    Context own;
    void (*body)(void*);
    void* argument;
    // Per lane two slots in turn, so that one barrier per shuffle is enough.
    uint64_t slots[MAX_THREADS][2];
    unsigned phase[MAX_THREADS];
    int count = 0;
    int counted = 0;

    explicit Scheduler(const Request& request, void (*body)(void*), void* argument);
    void start_block();
    bool run_ready();
    bool release_warps();
    bool release_block();
    unsigned in(State state) const;
    bool run_block(Message& message);
};

thread_local Scheduler* scheduler;
std::mutex message_lock;

Fiber& self() { return *static_cast<Fiber*>(current); }

void wait(State state) {
    self().state = state;
    self().context.switch_to(scheduler->own);
}

void enter() {
    scheduler->body(scheduler->argument);
    wait(State::Done);
    std::abort();
}

// Every number below n, in one of the orders; a correct kernel gives the same bits for all of them.
std::vector<unsigned> order_of(unsigned n, unsigned order) {
    unsigned stride = 17 + 2 * order;
    while (std::gcd(stride, n) != 1) stride++;
    std::vector<unsigned> all(n);
    for (unsigned k = 0; k < n; k++) {
        all[k] = order == 0 ? k : order == 1 ? n - 1 - k : (k + order) * stride % n;
    }
    return all;
}

Scheduler::Scheduler(const Request& request, void (*body)(void*), void* argument)
    : fibers(request.threads), order(order_of(request.threads, request.order)), body(body), argument(argument) {
    for (Fiber& fiber : fibers) fiber.stack.reset(new unsigned char[STACK_BYTES]);
}

void Scheduler::start_block() {
    count = 0;
    std::fill(std::begin(phase), std::end(phase), 0);
    for (unsigned i = 0; i < fibers.size(); i++) {
        Fiber& fiber = fibers[i];
        fiber.state = State::Ready;
        fiber.linear = i;
        fiber.index = {i, 0, 0};
        fiber.context.prepare(fiber.stack.get(), STACK_BYTES, enter);
    }
}

bool Scheduler::run_ready() {
    bool has_run = false;
    for (unsigned i : order) {
        if (fibers[i].state != State::Ready) continue;
        current = &fibers[i];
        own.switch_to(fibers[i].context);
        has_run = true;
    }
    return has_run;
}

// Warps go on once every lane that is waited for is there or has returned.
bool Scheduler::release_warps() {
    bool has_released = false;
    for (size_t first = 0; first < fibers.size(); first += WARP) {
        const size_t end = std::min(fibers.size(), first + WARP);
        unsigned here = 0, wanted = 0, missing = 0;
        for (size_t i = first; i < end; i++) {
            const unsigned bit = 1u << (i - first);
            if (fibers[i].state == State::AtWarp) {
                here |= bit;
                wanted |= fibers[i].mask;
            } else if (fibers[i].state != State::Done) {
                missing |= bit;
            }
        }
        if (here == 0 || (wanted & missing) != 0) continue;
        for (size_t i = first; i < end; i++) {
            if (fibers[i].state == State::AtWarp) fibers[i].state = State::Ready;
        }
        has_released = true;
    }
    return has_released;
}

bool Scheduler::release_block() {
    if (in(State::AtBlock) != fibers.size()) return false;
    counted = count;
    count = 0;
    for (Fiber& fiber : fibers) fiber.state = State::Ready;
    return true;
}

unsigned Scheduler::in(State state) const {
    return std::count_if(fibers.begin(), fibers.end(), [&](const Fiber& fiber) { return fiber.state == state; });
}

bool Scheduler::run_block(Message& message) {
    start_block();
    while (run_ready() || release_warps() || release_block()) {
    }
    const unsigned returned = in(State::Done);
    if (returned == fibers.size()) return true;
    message.set("barriers diverge in block (%u, %u): %u of %zu threads wait for the block, %u for their warp, %u have returned",
                block_index.x, block_index.y, in(State::AtBlock), fibers.size(), in(State::AtWarp), returned);
    return false;
}

}  // namespace

thread_local Thread* current;
thread_local dim3 block_index, block_size, grid_size;

void block_barrier() { wait(State::AtBlock); }

int block_count(bool flag) {
    scheduler->count += flag;
    block_barrier();
    return scheduler->counted;
}

void warp_barrier(unsigned mask) {
    self().mask = mask;
    wait(State::AtWarp);
}

uint64_t warp_exchange(unsigned mask, uint64_t value, int source) {
    const unsigned linear = current->linear;
    const unsigned phase = scheduler->phase[linear] ^= 1;
    scheduler->slots[linear][phase] = value;
    warp_barrier(mask);
    return scheduler->slots[linear / WARP * WARP + source][phase];
}

void Message::set(const char* format, ...) {
    std::lock_guard<std::mutex> guard(message_lock);
    if (text[0] != 0) return;
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, bytes, format, arguments);
    va_end(arguments);
}

bool run(const Request& request, void (*body)(void*), void* argument) {
    const uint64_t blocks = uint64_t(request.grid.x) * request.grid.y;
    std::atomic<uint64_t> next{0};
    std::atomic<bool> is_good{true};
    auto work = [&] {
        Scheduler own(request, body, argument);
        Message message = request.message;
        scheduler = &own;
        block_size = {request.threads, 1, 1};
        grid_size = request.grid;
        for (uint64_t i; is_good && (i = next++) < blocks;) {
            block_index = {unsigned(i % request.grid.x), unsigned(i / request.grid.x), 0};
            if (!own.run_block(message)) is_good = false;
        }
    };
    const uint64_t workers = std::min<uint64_t>(blocks, std::max(1u, std::thread::hardware_concurrency()));
    std::vector<std::thread> others;
    for (uint64_t i = 1; i < workers; i++) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
    return is_good;
}

}  // namespace emulator
