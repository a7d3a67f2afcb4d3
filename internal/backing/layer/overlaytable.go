package layer

import "github.com/vmdiskd/vmdiskd/internal/backing"

// clusterSize is the unit in which an overlay takes a disk over.
const clusterSize = 32 << 10

// cluster is where a cluster of the disk is kept: absent, zero, or its number
// in the store.
type cluster int32

const (
	absent cluster = 0 // as it is below
	zero   cluster = -1
)

// pageClusters are the clusters of one page of the table.
const pageClusters = 8192

// pageBytes is what a page costs.
const pageBytes = 4 * pageClusters

type page [pageClusters]cluster

// zeroPage stands for all pages that are zero throughout. It is never written
// to.
var zeroPage = func() *page {
	p := new(page)
	for i := range p {
		p[i] = zero
	}
	return p
}()

// overlayTable knows where each cluster of a disk is, and what the quota has
// left. Its owner locks.
type overlayTable struct {
	pages       []*page // nil: absent throughout
	count       int64   // clusters of the disk
	free        []cluster
	next        cluster // the first that was never taken
	used, quota int64   // bytes, pages included
}

// init is for a disk of size bytes. The quota is 0.
func (t *overlayTable) init(size int64) {
	const span = pageClusters * clusterSize
	t.pages = make([]*page, (size+span-1)/span)
	t.count = (size + clusterSize - 1) / clusterSize
	t.next = 1
}

func (t *overlayTable) at(no int64) cluster {
	if p := t.pages[no/pageClusters]; p != nil {
		return p[no%pageClusters]
	}
	return absent
}

// run is the state of the cluster at off, and how many of n bytes from there
// are in that state. What is in the store ends with its cluster.
func (t *overlayTable) run(off, n int64) (cluster, int64) {
	no := off / clusterSize
	c := t.at(no)
	end := (no + 1) * clusterSize
	for c <= absent && end < off+n {
		no++
		if p := t.pages[no/pageClusters]; no%pageClusters == 0 && (p == nil && c == absent || p == zeroPage && c == zero) {
			no += pageClusters - 1 // all of the page
		} else if t.at(no) != c {
			break
		}
		end = (no + 1) * clusterSize
	}
	return c, min(n, end-off)
}

// charge takes n bytes from the quota.
func (t *overlayTable) charge(n int64) error {
	if n > t.quota-t.used {
		return &backing.Error{Op: "take overlay cluster", Off: -1, Kind: backing.ErrNoSpace, Err: errQuota}
	}
	t.used += n
	return nil
}

// own gives cluster number no a page that can be changed.
func (t *overlayTable) own(no int64) (*page, error) {
	p := &t.pages[no/pageClusters]
	if *p != nil && *p != zeroPage {
		return *p, nil
	}
	if err := t.charge(pageBytes); err != nil {
		return nil, err
	}
	fresh := new(page)
	if *p == zeroPage {
		*fresh = *zeroPage
	}
	*p = fresh
	return fresh, nil
}

// take finds a cluster of the store for cluster number no of the disk, whose
// page can be changed then. It is set or given back.
func (t *overlayTable) take(no int64) (cluster, error) {
	if _, err := t.own(no); err != nil {
		return 0, err
	}
	if err := t.charge(clusterSize); err != nil {
		return 0, err
	}
	if n := len(t.free); n > 0 {
		c := t.free[n-1]
		t.free = t.free[:n-1]
		return c, nil
	}
	t.next++
	return t.next - 1, nil
}

// set places cluster number no, for which c was taken. The page is there: only
// zero takes one away, and that is exclusive with a write.
func (t *overlayTable) set(no int64, c cluster) { t.pages[no/pageClusters][no%pageClusters] = c }

// giveBack lets a cluster be taken again.
func (t *overlayTable) giveBack(c cluster) {
	t.free = append(t.free, c)
	t.used -= clusterSize
}

// zero makes clusters [first, end) of the disk read as zeroes and returns those
// of the store that held them. Unless all, it leaves what is absent. After an
// error some may be zero already.
func (t *overlayTable) zero(first, end int64, all bool) (freed []cluster, err error) {
	for no := first; no < end; {
		p := t.pages[no/pageClusters]
		stop := min(end, (no/pageClusters+1)*pageClusters)
		switch {
		case p == zeroPage || p == nil && !all:
		case all && no%pageClusters == 0 && stop-no == min(pageClusters, t.count-no):
			freed = append(freed, t.dropPage(no/pageClusters)...)
		default:
			if p, err = t.own(no); err != nil {
				return freed, err
			}
			for i := no % pageClusters; i <= (stop-1)%pageClusters; i++ {
				if p[i] > absent {
					freed = append(freed, p[i])
				}
				if all || p[i] > absent {
					p[i] = zero
				}
			}
		}
		no = stop
	}
	return freed, nil
}

// dropPage makes a page zero throughout and returns the clusters of the store
// that it named.
func (t *overlayTable) dropPage(i int64) (freed []cluster) {
	if p := t.pages[i]; p != nil {
		for _, c := range p {
			if c > absent {
				freed = append(freed, c)
			}
		}
		t.used -= pageBytes
	}
	t.pages[i] = zeroPage
	return freed
}
