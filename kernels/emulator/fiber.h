// Fibers: stacks that control moves between. On x86-64 a switch is a dozen instructions; elsewhere it goes through
// ucontext, which enters the kernel each time.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace fiber {

const size_t STACK_BYTES = 64 << 10;

#ifdef __x86_64__

// Pushes what the System V ABI says a callee keeps, exchanges the stacks, pops, and returns there.
extern "C" void hone_fiber_switch(void** from, void* to);
asm(R"(
.weak hone_fiber_switch
.hidden hone_fiber_switch
hone_fiber_switch:
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
    ret
)");

class Fiber {
  public:
    void start(void (*entry)(void*), void* argument) {
        if (!stack) stack.reset(new uint8_t[STACK_BYTES]);
        (void)argument;
        uintptr_t top = (reinterpret_cast<uintptr_t>(stack.get()) + STACK_BYTES) & ~uintptr_t(15);
        // As after a call: the return address is what `ret` takes, and the stack is 8 past a multiple of 16 in `entry`.
        uintptr_t* frame = reinterpret_cast<uintptr_t*>(top) - 8;
        for (int i = 0; i < 6; i++) frame[i] = 0;
        frame[6] = reinterpret_cast<uintptr_t>(entry);
        frame[7] = 0;
        saved = frame;
    }
    void switch_to(Fiber& other) { hone_fiber_switch(&saved, other.saved); }
    [[noreturn]] void leave_to(Fiber& other) const {
        void* nowhere;
        hone_fiber_switch(&nowhere, other.saved);
        __builtin_unreachable();
    }

  private:
    void* saved = nullptr;
    std::unique_ptr<uint8_t[]> stack;
};

#else

class Fiber {
  public:
    void start(void (*entry)(void*), void*) {
        if (!stack) stack.reset(new uint8_t[STACK_BYTES]);
        getcontext(&context);
        context.uc_stack.ss_sp = stack.get();
        context.uc_stack.ss_size = STACK_BYTES;
        context.uc_link = nullptr;
        makecontext(&context, reinterpret_cast<void (*)()>(reinterpret_cast<void (*)(void)>(reinterpret_cast<void*>(entry))), 0);
    }
    void switch_to(Fiber& other) { swapcontext(&context, &other.context); }
    [[noreturn]] void leave_to(Fiber& other) const {
        setcontext(&other.context);
        abort();
    }

  private:
    ucontext_t context{};
    std::unique_ptr<uint8_t[]> stack;
};

#endif

}  // namespace fiber
