package nbd

import (
	"sync"
	"testing"
)

// TestPartsOfAReplyStayTogether while others queue theirs.
func TestPartsOfAReplyStayTogether(t *testing.T) {
	o := &sender{}
	o.init(&session{opt: &Options{}}, nil)
	const rounds = 20000
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for range rounds {
				o.push(segment{head: []byte{1}}, segment{n: 1})
			}
		})
		wg.Go(func() {
			for range rounds {
				o.push(segment{head: []byte{2}})
			}
		})
	}
	wg.Wait()
	for i, g := range o.q {
		if g.n == 1 && (i == 0 || len(o.q[i-1].head) == 0 || o.q[i-1].head[0] != 1) {
			t.Fatalf("segment %d of %d is no continuation of the one before", i, len(o.q))
		}
	}
}

func TestTakenSegmentsShareNoMemoryWithWhatIsQueuedNext(t *testing.T) {
	s := &session{opt: &Options{}}
	o := &s.sender
	o.init(s, nil)
	for range 3 {
		o.push(segment{head: []byte{1}})
	}
	o.busy = true
	o.spare = o.takeLocked()[:0]
	o.push(segment{head: []byte{2}})
	first := o.takeLocked()
	// The owner fails and gives nothing back; somebody pushes meanwhile.
	o.push(segment{head: []byte{3}})
	second := o.takeLocked()
	o.push(segment{head: []byte{4}})
	if first[0].head[0] != 2 || second[0].head[0] != 3 {
		t.Errorf("taken were %v and %v, want 2 and 3", first[0].head, second[0].head)
	}
}
