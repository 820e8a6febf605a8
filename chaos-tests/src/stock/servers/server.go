// A web server that counts the requests of each connection, beside goroutines that pass numbers
// round a ring, a heap that is always busy, and timers.
package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"time"
)

type counter struct{}

func complain(format string, facts ...any) {
	fmt.Fprintf(os.Stderr, "<3>stock: "+format+"\n", facts...)
}

// A ring of goroutines: each adds one to the number that comes by.
func ring(members int) {
	first := make(chan uint64)
	from := first
	for i := 1; i < members; i++ {
		to := make(chan uint64)
		go func(from, to chan uint64) {
			for number := range from {
				to <- number + 1
			}
		}(from, to)
		from = to
	}
	for number := uint64(0); ; time.Sleep(time.Millisecond) {
		go func() { first <- number }()
		next := <-from
		if next != number+uint64(members)-1 {
			complain("the ring made %d of %d", next, number)
		}
		number = next
	}
}

// Garbage, and sleeps that must not end early.
func churn() {
	kept := make([][]byte, 1000)
	for turn := 0; ; turn++ {
		begin := time.Now()
		time.Sleep(5 * time.Millisecond)
		if past := time.Since(begin); past < 5*time.Millisecond {
			complain("a sleep of 5 ms ended after %v", past)
		}
		fresh := make([]byte, 16384)
		for i := range fresh {
			fresh[i] = byte(turn)
		}
		old := kept[turn%len(kept)]
		if old != nil && (old[0] != byte(turn-len(kept)) || old[16383] != old[0]) {
			complain("memory of turn %d is not what was written", turn-len(kept))
		}
		kept[turn%len(kept)] = fresh
	}
}

func main() {
	go ring(100)
	go churn()
	handle := func(answer http.ResponseWriter, question *http.Request) {
		count := question.Context().Value(counter{}).(*atomic.Uint64)
		fmt.Fprintf(answer, "count %d", count.Add(1))
	}
	server := http.Server{
		Addr:    "0.0.0.0:" + os.Args[1],
		Handler: http.HandlerFunc(handle),
		ConnContext: func(parent context.Context, _ net.Conn) context.Context {
			return context.WithValue(parent, counter{}, new(atomic.Uint64))
		},
	}
	complain("%v", server.ListenAndServe())
	os.Exit(1)
}
