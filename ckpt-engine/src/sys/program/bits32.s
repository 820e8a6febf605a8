# A program of 32 bits for the i386 interface that checks itself, as a whole file. The first letter
# of its first argument says what it does. It writes a byte to descriptor 1 after each round that
# came out right, and ends with the number of the check that did not.

.set BASE, 0x08048000
.set DATA, 0x0804c000
.set DATA_LEN, 0x8000

# What it keeps in memory.
.set VSYSCALL, DATA
.set SELF, DATA + 4
.set HANDLED, DATA + 8
.set ALARMS, DATA + 12
.set ALARMS_SEEN, DATA + 16
.set QUIET_ROUNDS, DATA + 20
.set HEAP, DATA + 24
.set ROUND, DATA + 28
.set PATH, DATA + 32
.set TOKEN, DATA + 36
.set CHILD_TID, DATA + 40
.set LATER_TID, DATA + 44
.set SEGMENT, DATA + 48
.set BYTE, DATA + 52
.set ARGUMENTS, DATA + 64
.set DESCRIPTOR, DATA + 128
.set BEFORE, DATA + 160
.set AFTER, DATA + 168
.set PAUSE, DATA + 176
.set ACTION, DATA + 192
.set STACK_NOW, DATA + 224
.set ROBUST, DATA + 256
.set HEAD_NOW, DATA + 272
.set TIMER, DATA + 288
.set VECTOR, DATA + 320
.set POLLED, DATA + 352
.set TICKS, DATA + 360
.set TICKS_SEEN, DATA + 364
.set TICKER, DATA + 368
.set LOCAL_SEGMENT, DATA + 372
.set NAP, DATA + 376
.set EVENT, DATA + 384
.set PERIOD, DATA + 400
.set COMMON, DATA + 448
.set LOCALS, DATA + 512
.set OWN_LOCALS, DATA + 768
.set SIGNAL_STACK, DATA + 0x2000
.set SIGNAL_STACK_LEN, 0x3000
.set THREAD_STACK, DATA + 0x6000
.set LATER_STACK, DATA + 0x7000

.set LOCAL, 0x10ca1001
.set OWN_LOCAL, 0x10ca1002
.set COMMON_VALUE, 0x10ca1003
.set TICK_VALUE, 0x10ca1004
.set SIGNAL_FLAGS, 0x08000004
.set ALARM_FLAGS, 0x0c000004

.section .rodata.bits32, "a", @progbits
.globl ferry_bits32_start
.globl ferry_bits32_end
.p2align 4
ferry_bits32_start:
    .byte 0x7f, 0x45, 0x4c, 0x46, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0
    .short 2, 3
    .long 1, BASE + (begin - ferry_bits32_start), 52, 0, 0
    .short 52, 32, 3, 0, 0, 0
    # Code, memory, and a stack without code.
    .long 1, 0, BASE, BASE, ferry_bits32_end - ferry_bits32_start
    .long ferry_bits32_end - ferry_bits32_start, 5, 0x1000
    .long 1, 0, DATA, DATA, 0, DATA_LEN, 6, 0x1000
    .long 0x6474e551, 0, 0, 0, 0, 0, 6, 16

.code32
shell:
    .asciz "/bin/sh"
minus_c:
    .asciz "-c"
back:
    .asciz "exec \"$0\" e"

.macro ask number
    movl $\number, %eax
    int $0x80
.endm

# The last comparison must have come out equal.
.macro expect code
    movl $\code, %edi
    jne fail
.endm

# As `expect`, where the compared value is one that says less or equal.
.macro expect_le code
    movl $\code, %edi
    ja fail
.endm

begin:
    movl (%esp), %ecx
    movl 4(%esp), %eax
    movl %eax, PATH
    movl 8(%esp), %esi
    # Behind the arguments and the environment comes what the kernel tells.
    leal 8(%esp,%ecx,4), %edi
1:  movl (%edi), %eax
    addl $4, %edi
    testl %eax, %eax
    jnz 1b
2:  movl (%edi), %eax
    testl %eax, %eax
    jz 3f
    cmpl $32, %eax
    jne 4f
    movl 4(%edi), %eax
    movl %eax, VSYSCALL
4:  addl $8, %edi
    jmp 2b
3:  ask 20
    movl %eax, SELF
    movb (%esi), %al
    cmpb $'o', %al
    je once
    cmpb $'e', %al
    je executing
    pushl %eax
    calll set_up
    popl %eax
    cmpb $'a', %al
    je all
    cmpb $'w', %al
    je waits
    cmpb $'t', %al
    je threads
    movl $99, %edi
fail:
    movl %edi, %ebx
    ask 252

# The kernel's own way in, if there is one.
enter:
    cmpl $0, VSYSCALL
    je 1f
    jmp *VSYSCALL
1:  int $0x80
    ret

# One round came out right.
report:
    movl $1, %ebx
    movl $BYTE, %ecx
    movl $1, %edx
    ask 4
    cmpl $1, %eax
    expect 1
    ret

# Sleeps for %ecx nanoseconds, with values in the registers that stay as they are.
pause:
    movl $0, PAUSE
    movl %ecx, PAUSE + 4
    movl $PAUSE, %ebx
    xorl %ecx, %ecx
    movl $0x5eed0001, %edx
    movl $0x5eed0002, %esi
    movl $0x5eed0003, %edi
    movl $0x5eed0004, %ebp
    movl $162, %eax
    calll enter
    cmpl $0x5eed0003, %edi
    expect 2
    cmpl $0x5eed0001, %edx
    expect 3
    cmpl $0x5eed0002, %esi
    expect 4
    cmpl $0x5eed0004, %ebp
    expect 5
    cmpl $PAUSE, %ebx
    expect 6
    ret

# Describes a segment of thread-locals at %eax to the kernel, with the number in %ecx.
describe:
    movl %ecx, DESCRIPTOR
    movl %eax, DESCRIPTOR + 4
    movl $0xfffff, DESCRIPTOR + 8
    movl $0x51, DESCRIPTOR + 12
    ret

set_up:
    movl $LOCAL, LOCALS
    movl $LOCALS, %eax
    movl $-1, %ecx
    calll describe
    movl $DESCRIPTOR, %ebx
    ask 243
    testl %eax, %eax
    expect 10
    movl DESCRIPTOR, %eax
    leal 3(,%eax,8), %eax
    movl %eax, SEGMENT
    movl %eax, %gs
    # The list of locks to be given back at the end.
    movl $ROBUST, ROBUST
    movl $ROBUST, %ebx
    movl $12, %ecx
    ask 311
    testl %eax, %eax
    expect 11
    # A stack for handlers.
    movl $SIGNAL_STACK, STACK_NOW
    movl $0, STACK_NOW + 4
    movl $SIGNAL_STACK_LEN, STACK_NOW + 8
    movl $STACK_NOW, %ebx
    xorl %ecx, %ecx
    ask 186
    testl %eax, %eax
    expect 12
    # One handler that returns through the kernel's code, and one through ours.
    movl $(BASE + (handler - ferry_bits32_start)), ACTION
    movl $SIGNAL_FLAGS, ACTION + 4
    movl $0, ACTION + 8
    movl $0, ACTION + 12
    movl $0, ACTION + 16
    movl $10, %ebx
    movl $ACTION, %ecx
    xorl %edx, %edx
    movl $8, %esi
    ask 174
    testl %eax, %eax
    expect 13
    movl $(BASE + (alarm - ferry_bits32_start)), ACTION
    movl $ALARM_FLAGS, ACTION + 4
    movl $(BASE + (restorer - ferry_bits32_start)), ACTION + 8
    movl $14, %ebx
    ask 174
    testl %eax, %eax
    expect 14
    # A heap.
    xorl %ebx, %ebx
    ask 45
    movl %eax, HEAP
    leal 0x10000(%eax), %ebx
    ask 45
    cmpl %ebx, %eax
    expect 15
    # A segment that all threads have in common, where the kernel has such.
    movl $COMMON_VALUE, COMMON
    movl $COMMON, %eax
    movl $2, %ecx
    calll describe
    movl $17, %ebx
    movl $DESCRIPTOR, %ecx
    movl $16, %edx
    ask 123
    testl %eax, %eax
    jnz 1f
    movl $(2 * 8 + 7), %eax
    movl %eax, LOCAL_SEGMENT
    movl %eax, %fs
    # A vector, and a control word that is not the usual one.
1:  movl $0x5eed0005, VECTOR
    movl $0x5eed0006, VECTOR + 4
    movl $0x5eed0007, VECTOR + 8
    movl $0x5eed0008, VECTOR + 12
    movups VECTOR, %xmm7
    movl $0x0f7f, VECTOR + 16
    fldcw VECTOR + 16
    ret

# On the stack for handlers, with the thread-locals of whoever it interrupts.
handler:
    movl %esp, %eax
    subl $SIGNAL_STACK, %eax
    cmpl $SIGNAL_STACK_LEN, %eax
    expect_le 20
    cmpl $LOCAL, %gs:0
    expect 21
    # The signal, its number in what comes with it, and its sender.
    cmpl $10, 4(%esp)
    expect 22
    movl 8(%esp), %eax
    cmpl $10, (%eax)
    expect 23
    movl SELF, %ecx
    cmpl %ecx, 12(%eax)
    expect 24
    xorps %xmm7, %xmm7
    incl HANDLED
    ret

alarm:
    movl %esp, %eax
    subl $SIGNAL_STACK, %eax
    cmpl $SIGNAL_STACK_LEN, %eax
    expect_le 25
    xorps %xmm7, %xmm7
    # Often enough it is here when it is stopped, but not always: where it gets little time another
    # alarm waits by then.
    incl ALARMS
    testl $3, ALARMS
    jnz 1f
    movl $0, NAP
    movl $4000000, NAP + 4
    movl $NAP, %ebx
    xorl %ecx, %ecx
    movl $162, %eax
    calll enter
1:  cmpl $LOCAL, %gs:0
    expect 26
    ret

# Of a timer, with a value that it has been given.
tick:
    movl 8(%esp), %eax
    cmpl $TICK_VALUE, 20(%eax)
    expect 27
    incl TICKS
    ret

restorer:
    movl $173, %eax
    int $0x80

# Everything that stays as it is.
standing:
    cmpl $LOCAL, %gs:0
    expect 30
    # Once more, by what the kernel knows of the segment.
    movl SEGMENT, %eax
    xorl %ecx, %ecx
    movl %ecx, %gs
    movl %eax, %gs
    cmpl $LOCAL, %gs:0
    expect 31
    movl SEGMENT, %eax
    shrl $3, %eax
    movl %eax, DESCRIPTOR
    movl $0, DESCRIPTOR + 4
    movl $DESCRIPTOR, %ebx
    ask 244
    testl %eax, %eax
    expect 32
    cmpl $LOCALS, DESCRIPTOR + 4
    expect 33
    # The segment that all threads have in common.
    movl LOCAL_SEGMENT, %eax
    testl %eax, %eax
    jz 1f
    cmpl $COMMON_VALUE, %fs:0
    expect 51
    xorl %ecx, %ecx
    movl %ecx, %fs
    movl %eax, %fs
    cmpl $COMMON_VALUE, %fs:0
    expect 52
    # The list of locks.
1:  xorl %ebx, %ebx
    movl $HEAD_NOW, %ecx
    movl $(HEAD_NOW + 4), %edx
    ask 312
    testl %eax, %eax
    expect 34
    cmpl $ROBUST, HEAD_NOW
    expect 35
    # The stack for handlers.
    xorl %ebx, %ebx
    movl $STACK_NOW, %ecx
    ask 186
    testl %eax, %eax
    expect 36
    cmpl $SIGNAL_STACK, STACK_NOW
    expect 37
    cmpl $SIGNAL_STACK_LEN, STACK_NOW + 8
    expect 38
    # A handler.
    movl $10, %ebx
    xorl %ecx, %ecx
    movl $ACTION, %edx
    movl $8, %esi
    ask 174
    testl %eax, %eax
    expect 39
    cmpl $(BASE + (handler - ferry_bits32_start)), ACTION
    expect 40
    cmpl $SIGNAL_FLAGS, ACTION + 4
    expect 41
    # Who it is.
    ask 20
    cmpl %eax, SELF
    expect 42
    # Registers for numbers that are no integers.
    movups %xmm7, VECTOR + 32
    movl VECTOR, %eax
    cmpl %eax, VECTOR + 32
    expect 43
    movl VECTOR + 12, %eax
    cmpl %eax, VECTOR + 44
    expect 44
    fnstcw VECTOR + 20
    cmpw $0x0f7f, VECTOR + 20
    expect 45
    # The heap: what was put there in the last round, and an end that is known.
    movl HEAP, %ecx
    movl ROUND, %eax
    cmpl %eax, 0x8000(%ecx)
    expect 46
    incl %eax
    movl %eax, ROUND
    movl %eax, 0x8000(%ecx)
    xorl %ebx, %ebx
    ask 45
    subl HEAP, %eax
    cmpl $0x10000, %eax
    expect 47
    # New memory, and its end.
    xorl %ebx, %ebx
    movl $0x3000, %ecx
    movl $3, %edx
    movl $0x22, %esi
    movl $-1, %edi
    xorl %ebp, %ebp
    ask 192
    cmpl $-4096, %eax
    movl $48, %edi
    ja fail
    movl %eax, %ebx
    cmpl $0, 0x1000(%ebx)
    expect 49
    movl $1, 0x1000(%ebx)
    ask 91
    testl %eax, %eax
    expect 50
    ret

# The clock that never goes back, at %ecx.
clock:
    movl $1, %ebx
    ask 265
    testl %eax, %eax
    expect 60
    ret

all:
    # An alarm every 20 milliseconds.
    movl $0, TIMER
    movl $20000, TIMER + 4
    movl $0, TIMER + 8
    movl $20000, TIMER + 12
    xorl %ebx, %ebx
    movl $TIMER, %ecx
    xorl %edx, %edx
    ask 104
    testl %eax, %eax
    expect 61
    # A timer with a value, every 30 milliseconds.
    movl $(BASE + (tick - ferry_bits32_start)), ACTION
    movl $SIGNAL_FLAGS, ACTION + 4
    movl $0, ACTION + 8
    movl $12, %ebx
    movl $ACTION, %ecx
    xorl %edx, %edx
    movl $8, %esi
    ask 174
    testl %eax, %eax
    expect 68
    movl $TICK_VALUE, EVENT
    movl $12, EVENT + 4
    movl $0, EVENT + 8
    movl $1, %ebx
    movl $EVENT, %ecx
    movl $TICKER, %edx
    ask 259
    testl %eax, %eax
    expect 69
    movl $0, PERIOD
    movl $30000000, PERIOD + 4
    movl $0, PERIOD + 8
    movl $30000000, PERIOD + 12
    movl TICKER, %ebx
    xorl %ecx, %ecx
    movl $PERIOD, %edx
    xorl %esi, %esi
    ask 260
    testl %eax, %eax
    expect 53
1:  calll standing
    # A signal to itself is handled before the call returns.
    movl HANDLED, %esi
    incl %esi
    movl SELF, %ebx
    movl $10, %ecx
    ask 37
    testl %eax, %eax
    expect 62
    cmpl %esi, HANDLED
    expect 63
    # A wait takes its time, unless an alarm ends it.
    movl $BEFORE, %ecx
    calll clock
    movl ALARMS, %eax
    addl TICKS, %eax
    pushl %eax
    movl $5000000, %ecx
    calll pause
    movl %eax, %esi
    movl $AFTER, %ecx
    calll clock
    popl %ecx
    cmpl $-4, %esi
    jne 2f
    movl ALARMS, %eax
    addl TICKS, %eax
    cmpl %eax, %ecx
    movl $64, %edi
    je fail
    jmp 3f
2:  testl %esi, %esi
    expect 65
    movl AFTER, %eax
    subl BEFORE, %eax
    imull $1000000000, %eax, %eax
    addl AFTER + 4, %eax
    subl BEFORE + 4, %eax
    cmpl $5000000, %eax
    movl $66, %edi
    jb fail
    # Alarms come, and ticks.
3:  incl QUIET_ROUNDS
    movl ALARMS, %eax
    movl TICKS, %ecx
    cmpl ALARMS_SEEN, %eax
    je 4f
    cmpl TICKS_SEEN, %ecx
    je 4f
    movl %eax, ALARMS_SEEN
    movl %ecx, TICKS_SEEN
    movl $0, QUIET_ROUNDS
4:  cmpl $200, QUIET_ROUNDS
    expect_le 67
    calll report
    jmp 1b

# Waits that are long enough to be interrupted more than once.
waits:
1:  calll standing
    movl $BEFORE, %ecx
    calll clock
    movl $400000000, %ecx
    calll pause
    testl %eax, %eax
    expect 70
    calll report
    # Nothing to wait for but time; without the kernel's way in.
    movl $POLLED, %ebx
    xorl %ecx, %ecx
    movl $300, %edx
    ask 168
    testl %eax, %eax
    expect 71
    calll report
    # A word that nobody changes.
    movl $0, TOKEN
    movl $TOKEN, %ebx
    movl $128, %ecx
    xorl %edx, %edx
    movl $0, PAUSE
    movl $250000000, PAUSE + 4
    movl $PAUSE, %esi
    movl $240, %eax
    calll enter
    cmpl $-110, %eax
    expect 72
    # A call that the kernel itself does not make again: wait for a signal that does not come.
    movl $0x800, ACTION
    movl $0, ACTION + 4
    movl $ACTION, %ebx
    xorl %ecx, %ecx
    movl $PAUSE, %edx
    movl $8, %esi
    movl $177, %eax
    calll enter
    cmpl $-11, %eax
    expect 73
    # None of them was too short.
    movl $AFTER, %ecx
    calll clock
    movl AFTER, %eax
    subl BEFORE, %eax
    imull $1000, %eax, %esi
    movl AFTER + 4, %eax
    subl BEFORE + 4, %eax
    cltd
    movl $1000000, %ecx
    idivl %ecx
    addl %eax, %esi
    cmpl $1199, %esi
    movl $74, %edi
    jb fail
    calll report
    jmp 1b

# Two threads that pass a word to and fro, and a third one that is new in every round.
threads:
    movl $OWN_LOCAL, OWN_LOCALS
    movl $OWN_LOCALS, %eax
    movl SEGMENT, %ecx
    shrl $3, %ecx
    calll describe
    # VM FS FILES SIGHAND THREAD SYSVSEM SETTLS CHILD_CLEARTID
    movl $0x2d0f00, %ebx
    movl $(LATER_STACK - 16), %ecx
    xorl %edx, %edx
    movl $DESCRIPTOR, %esi
    movl $CHILD_TID, %edi
    ask 120
    testl %eax, %eax
    jz other
    cmpl $-4096, %eax
    movl $80, %edi
    ja fail
1:  calll standing
    movl $1, LATER_TID
    movl $0x250f00, %ebx
    movl $(DATA + DATA_LEN - 16), %ecx
    xorl %edx, %edx
    xorl %esi, %esi
    movl $LATER_TID, %edi
    ask 120
    testl %eax, %eax
    jz later
    cmpl $-4096, %eax
    movl $81, %edi
    ja fail
    # Its end.
2:  movl LATER_TID, %edx
    testl %edx, %edx
    jz 3f
    movl $LATER_TID, %ebx
    xorl %ecx, %ecx
    xorl %esi, %esi
    ask 240
    jmp 2b
3:  movl $1, %eax
    movl $0, %edx
    calll hand_over
    movl $3000000, %ecx
    calll pause
    testl %eax, %eax
    expect 82
    calll report
    jmp 1b

later:
    xorl %ebx, %ebx
    ask 1

other:
    cmpl $OWN_LOCAL, %gs:0
    expect 83
    movl %gs, %ecx
    xorl %eax, %eax
    movl %eax, %gs
    movl %ecx, %gs
    cmpl $OWN_LOCAL, %gs:0
    expect 84
    xorl %eax, %eax
    movl $1, %edx
    calll wait_for
    xorl %eax, %eax
    calll give
    jmp other

# Gives the word away as %eax, and waits until it is %edx.
hand_over:
    calll give
wait_for:
    movl %edx, %ebp
1:  movl TOKEN, %edx
    cmpl %edx, %ebp
    je 2f
    movl $TOKEN, %ebx
    movl $128, %ecx
    xorl %esi, %esi
    movl $240, %eax
    pushl %ebp
    calll enter
    popl %ebp
    testl %eax, %eax
    jz 1b
    cmpl $-11, %eax
    expect 85
    jmp 1b
2:  ret

give:
    xchgl %eax, TOKEN
    pushl %edx
    movl $TOKEN, %ebx
    movl $129, %ecx
    movl $8, %edx
    ask 240
    popl %edx
    ret

# It only says that it was there.
once:
    calll set_up
    calll standing
    xorl %ebx, %ebx
    ask 252

# A shell takes its place, and gives it back.
executing:
    calll set_up
    calll standing
    movl $5000000, %ecx
    calll pause
    testl %eax, %eax
    expect 90
    calll report
    movl $(BASE + (shell - ferry_bits32_start)), ARGUMENTS
    movl $(BASE + (minus_c - ferry_bits32_start)), ARGUMENTS + 4
    movl $(BASE + (back - ferry_bits32_start)), ARGUMENTS + 8
    movl PATH, %eax
    movl %eax, ARGUMENTS + 12
    movl $0, ARGUMENTS + 16
    movl $(BASE + (shell - ferry_bits32_start)), %ebx
    movl $ARGUMENTS, %ecx
    xorl %edx, %edx
    ask 11
    movl $91, %edi
    jmp fail

ferry_bits32_end:

# Code of 64 bits that calls a piece of 32, for a place that both can reach: its first page; in its
# second page it keeps what it needs. Counts down from the first argument, and gives three times
# that and the second.
.set WITHIN, 0x20000000
.set KEPT, WITHIN + 0x1000
.globl ferry_within_start
.globl ferry_within_end
.code64
ferry_within_start:
    pushq %rbx
    pushq %rbp
    movq %rsp, KEPT
    movl $(KEPT + 0x800), %esp
    movl %edi, %ecx
    movl %esi, %eax
    movl $(WITHIN + (within - ferry_within_start)), KEPT + 16
    movw $0x23, KEPT + 20
    lcall *KEPT + 16
    movq KEPT, %rsp
    popq %rbp
    popq %rbx
    ret
.code32
within:
    pushl %ecx
1:  addl $3, %eax
    decl %ecx
    jnz 1b
    popl %ecx
    lret
ferry_within_end:
.code64
