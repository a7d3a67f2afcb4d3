package nbd

import "testing"

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
